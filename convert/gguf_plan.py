"""Plan a GGUF file: which type each tensor gets, where it goes, and how its bytes are made.

The type rules are those of llama.cpp's converter: vectors, norms and what is not a ``.weight``
stay F32, a row that does not fill blocks falls back to F16, all else gets the type asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np

from ..errors import ConfigError, QuantError, did_you_mean
from ..quant import GgmlType, quantize, type_by_name
from ..shardio.payload import BytesPayload, EncodedPayload, Payload, TensorPayload
from ..shardio.stream import OutFile
from ..shardio.tensor import LazyTensor
from .architectures import MappedTensor
from .gguf import KeyValue, TensorSpec, build_header

#: Output types that need no recipe, with their ``general.file_type``.
FILE_TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}

_FLOAT32 = np.dtype(np.float32)
_FLOAT16 = np.dtype(np.float16)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PLAIN: Mapping[str, np.dtype] = {"F32": _FLOAT32, "F16": _FLOAT16, "BF16": _BFLOAT16}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output. ``source`` is its Hugging Face name, ``shape`` row-major."""

    name: str
    source: str
    shape: tuple[int, ...]
    type: GgmlType
    nbytes: int
    tensor: LazyTensor


def parse_type(name: str, tensors: Sequence[MappedTensor]) -> GgmlType:
    """Return the type asked for; ``auto`` is that of the weights (BF16 or F16).

    Raises:
        ConfigError: not a type this writes.
    """
    if name.lower() == "auto":
        for mapped in tensors:
            if mapped.tensor.ndim >= 2 and mapped.tensor.dtype in (_BFLOAT16, _FLOAT16):
                return type_by_name("BF16" if mapped.tensor.dtype == _BFLOAT16 else "F16")
        return type_by_name("F16")
    if name.upper() not in FILE_TYPES:
        known = [*(t.lower() for t in FILE_TYPES), "auto"]
        raise ConfigError(
            f"unknown output type {name!r}{did_you_mean(name.lower(), known)}; "
            f"types: {', '.join(known)}"
        )
    return type_by_name(name)


def plan_tensors(mapped: Sequence[MappedTensor], target: GgmlType) -> list[PlannedTensor]:
    """Choose the type of every tensor."""
    return [_planned(one, _choose(one, target)) for one in mapped]


def _planned(one: MappedTensor, kind: GgmlType) -> PlannedTensor:
    shape = one.tensor.shape
    nbytes = prod(shape[:-1]) * kind.row_bytes(shape[-1])
    return PlannedTensor(one.name, one.hf, shape, kind, nbytes, one.tensor)


def _choose(one: MappedTensor, target: GgmlType) -> GgmlType:
    flat = one.tensor.ndim <= 1 or one.name.endswith("_norm.weight")
    if flat or one.keep_f32 or not one.name.endswith(".weight"):
        return type_by_name("F32")
    if one.tensor.shape[-1] % target.block:
        return type_by_name("F16")
    return target


def plan_file(name: str, metadata: Sequence[KeyValue], tensors: Sequence[PlannedTensor]) -> OutFile:
    """Return the file to be written: header first, then the tensors in the given order.

    Raises:
        FormatError: a name or shape that GGUF cannot hold.
    """
    specs = [TensorSpec(t.name, t.shape, t.type.id, t.nbytes) for t in tensors]
    header = build_header(metadata, specs)
    parts: list[tuple[int, Payload]] = [(0, BytesPayload(header.data))]
    parts += zip(header.offsets, map(payload, tensors), strict=True)
    return OutFile(name, header.file_size, tuple(parts))


def payload(planned: PlannedTensor) -> Payload:
    """Return the bytes of a tensor: copied where nothing changes, else encoded row by row."""
    tensor = planned.tensor
    if tensor.dtype == _PLAIN.get(planned.type.name):
        return TensorPayload(tensor)
    if tensor.dtype not in _PLAIN.values():
        tensor = tensor.cast(_FLOAT32)
    return EncodedPayload(tensor, _encoder(planned), planned.type.row_bytes(planned.shape[-1]))


def _encoder(planned: PlannedTensor) -> Callable[[np.ndarray], np.ndarray]:
    def encode(rows: np.ndarray) -> np.ndarray:
        try:
            return quantize(rows, planned.type, threads=1)
        except QuantError as error:
            raise QuantError(f"tensor {planned.source!r} as {planned.name!r}: {error}") from error

    return encode
