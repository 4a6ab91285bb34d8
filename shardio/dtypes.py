"""Element types: one table between numpy (ml_dtypes), torch and safetensors spellings.

Everything in mconv carries a ``np.dtype``. Types that numpy lacks (bfloat16, float8, float4) come
from ``ml_dtypes``. Spellings follow ``torch.dtype`` names and the safetensors format page
(github.com/huggingface/safetensors).
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ..errors import ConfigError, UnsupportedError, did_you_mean


@dataclass(frozen=True, slots=True)
class _Row:
    name: str  # torch spelling, and how mconv prints it
    safetensors: str
    dtype: np.dtype
    aliases: tuple[str, ...] = ()


_TABLE: tuple[_Row, ...] = (
    _Row("float64", "F64", np.dtype(np.float64), ("double", "f64", "fp64")),
    _Row("float32", "F32", np.dtype(np.float32), ("float", "f32", "fp32")),
    _Row("float16", "F16", np.dtype(np.float16), ("half", "f16", "fp16")),
    _Row("bfloat16", "BF16", np.dtype(ml_dtypes.bfloat16), ("bf16",)),
    _Row("float8_e4m3fn", "F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn), ("fp8", "f8_e4m3")),
    _Row("float8_e5m2", "F8_E5M2", np.dtype(ml_dtypes.float8_e5m2), ("f8_e5m2",)),
    _Row("float8_e4m3fnuz", "F8_E4M3FNUZ", np.dtype(ml_dtypes.float8_e4m3fnuz)),
    _Row("float8_e5m2fnuz", "F8_E5M2FNUZ", np.dtype(ml_dtypes.float8_e5m2fnuz)),
    _Row("float8_e8m0fnu", "F8_E8M0", np.dtype(ml_dtypes.float8_e8m0fnu)),
    _Row("int64", "I64", np.dtype(np.int64), ("long", "i64")),
    _Row("int32", "I32", np.dtype(np.int32), ("int", "i32")),
    _Row("int16", "I16", np.dtype(np.int16), ("short", "i16")),
    _Row("int8", "I8", np.dtype(np.int8), ("char", "i8")),
    _Row("uint64", "U64", np.dtype(np.uint64), ("u64",)),
    _Row("uint32", "U32", np.dtype(np.uint32), ("u32",)),
    _Row("uint16", "U16", np.dtype(np.uint16), ("u16",)),
    _Row("uint8", "U8", np.dtype(np.uint8), ("byte", "u8")),
    _Row("bool", "BOOL", np.dtype(np.bool_)),
    _Row("complex64", "C64", np.dtype(np.complex64), ("cfloat",)),
)

_BY_NAME = {alias: r for r in _TABLE for alias in (r.name, *r.aliases)}
_BY_CODE = {r.safetensors: r for r in _TABLE}
_BY_DTYPE = {r.dtype: r for r in _TABLE}

BFLOAT16 = _BY_NAME["bfloat16"].dtype
FLOAT32 = _BY_NAME["float32"].dtype
FLOAT16 = _BY_NAME["float16"].dtype


def from_torch(name: str) -> np.dtype:
    """Return the dtype of a torch spelling: ``bfloat16``, ``torch.bfloat16``, ``half``...

    Raises:
        UnsupportedError: torch types without a numpy counterpart (quantized, complex32).
    """
    row = _BY_NAME.get(name.removeprefix("torch."))
    if row is None:
        raise UnsupportedError(f"torch dtype {name!r} has no counterpart in mconv")
    return row.dtype


def from_safetensors(code: str) -> np.dtype:
    """Return the dtype of a safetensors code such as ``BF16``.

    Raises:
        UnsupportedError: codes outside the table.
    """
    row = _BY_CODE.get(code)
    if row is None:
        raise UnsupportedError(f"safetensors dtype {code!r} is not known to mconv")
    return row.dtype


def to_safetensors(dtype: np.dtype) -> str:
    """Return the safetensors code of a dtype. Raises UnsupportedError when there is none."""
    row = _BY_DTYPE.get(np.dtype(dtype))
    if row is None:
        raise UnsupportedError(f"dtype {dtype} cannot be stored in safetensors")
    return row.safetensors


def name(dtype: np.dtype) -> str:
    """Return mconv's (and torch's) name of a dtype: ``bfloat16``, ``float8_e4m3fn``..."""
    row = _BY_DTYPE.get(np.dtype(dtype))
    return row.name if row else str(dtype)


def parse(text: str) -> np.dtype:
    """Return the dtype a user typed (``bf16``, ``float32``, ``F16``...).

    Raises:
        ConfigError: unknown spelling, with the closest known one.
    """
    row = _BY_NAME.get(text.lower().removeprefix("torch."))
    if row is None:
        raise ConfigError(f"unknown dtype {text!r}{did_you_mean(text.lower(), _BY_NAME)}")
    return row.dtype


def parse_cast(text: str) -> np.dtype:
    """Return the dtype a user wants weights cast to: f64, f32, f16 or bf16.

    Integers and float8 need a scale per block to mean anything; without one they lose the weights.

    Raises:
        ConfigError: unknown spelling, or a type that weights cannot simply be cast to.
    """
    dtype = parse(text)
    if dtype not in (np.dtype(np.float64), FLOAT32, FLOAT16, BFLOAT16):
        raise ConfigError(
            f"weights cannot be cast to {name(dtype)}, which would lose them: give f32, f16 or "
            "bf16 (`mconv to-gguf` and `mconv quantize` quantize)"
        )
    return dtype


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype is a real floating type (numpy calls the ml_dtypes ones 'V' or 'f')."""
    return name(dtype).startswith(("float", "bfloat"))
