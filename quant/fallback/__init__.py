"""The block formats as array programs: slower than the native kernels, the same bytes.

Each module here may export ``ENCODERS``, a map from type name to a function of ``x`` (float32
[rows, cols]) and ``importance`` (float32 [cols] or None) that returns uint8 [rows, row bytes], and
``FULL``, the same for the search that minimizes the error under given weights [cols]. They take
numpy arrays and torch tensors. Modules are discovered, so a new family is one new file. Decoding
goes through gguf-py, or through a module's ``DECODERS`` (uint8 [blocks, block bytes] to float32)
for types that gguf-py lacks.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from ..types import GgmlType

# Byte offsets of the float16 scales inside a block; types without an entry have none.
_SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "Q1_0": (0,), "Q2_0": (0,),
}  # fmt: skip


@cache
def _found(table: str) -> dict[str, Callable[..., npt.NDArray]]:
    found: dict[str, Callable[..., npt.NDArray]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        found.update(getattr(import_module(f".{info.name}", __name__), table, {}))
    return found


def encode(
    x: npt.NDArray[np.float32],
    kind: GgmlType,
    importance: npt.NDArray[np.float32] | None,
    *,
    full: bool = False,
) -> npt.NDArray[np.uint8]:
    """Encode finite float32 rows [rows, cols]; returns uint8 [rows, row bytes].

    ``full`` takes the search for the least error, under importance or equal weights.
    """
    encoder = array_encoder(kind, full=full)
    assert encoder is not None, kind.name
    if full and importance is None:
        importance = np.ones(x.shape[1], np.float32)
    with np.errstate(all="ignore"):
        return encoder(x, importance).reshape(x.shape[0], -1)


def array_encoder(kind: GgmlType, *, full: bool = False) -> Callable[..., Any] | None:
    """Return the encoder of ``kind``, or None for types that are plain casts."""
    return _found("FULL" if full else "ENCODERS").get(kind.name)


def scales_overflow(data: npt.NDArray[np.uint8], kind: GgmlType) -> bool:
    """Return whether a block scale of encoded ``data`` became infinite or NaN in float16."""
    blocks = data.reshape(-1, kind.bytes)
    return any(
        bool(((blocks[:, at + 1] & 0x7C) == 0x7C).any()) for at in _SCALES.get(kind.name, ())
    )


def decode(data: npt.NDArray[np.uint8], kind: GgmlType) -> npt.NDArray[np.float32]:
    """Decode flat bytes to flat float32 values."""
    if kind.name == "F32":
        return data.view(np.float32).copy()
    blocks = data.reshape(-1, kind.bytes)
    decoder = _found("DECODERS").get(kind.name)
    if decoder is not None:
        return decoder(blocks).reshape(-1)
    import gguf

    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.id))
    return np.ascontiguousarray(values, np.float32).reshape(-1)
