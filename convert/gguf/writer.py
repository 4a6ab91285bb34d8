"""GGUF header bytes: magic, metadata, tensor infos and the offsets of the tensor data.

Format: ggml's GGUF v3. Building the header and moving the tensor bytes are separate jobs: the
header needs only names, shapes, types and sizes, so every output offset is known before the first
byte of a weight is read. The same input always gives the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import FormatError
from .values import SCALAR_CODES, KeyValue, ValueType

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
#: ggml keeps tensor names in 64 bytes, the closing NUL included.
MAX_NAME_BYTES = 63

_LIMITS = {
    ValueType.U8: (0, 2**8 - 1),
    ValueType.I8: (-(2**7), 2**7 - 1),
    ValueType.U16: (0, 2**16 - 1),
    ValueType.I16: (-(2**15), 2**15 - 1),
    ValueType.U32: (0, 2**32 - 1),
    ValueType.I32: (-(2**31), 2**31 - 1),
    ValueType.U64: (0, 2**64 - 1),
    ValueType.I64: (-(2**63), 2**63 - 1),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: ``shape`` is row-major (outermost first), ``type_id`` is ggml's."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """``data`` is the file's beginning, ``offsets`` are the tensors' bytes from file start."""

    data: bytes
    offsets: tuple[int, ...]
    file_size: int


def build_header(
    metadata: Sequence[KeyValue],
    tensors: Sequence[TensorSpec],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    big_endian: bool = False,
) -> Header:
    """Return the header of a GGUF file that holds ``tensors`` in the given order.

    Each tensor starts at a multiple of ``alignment`` bytes and the file ends on one, as ggml asks.
    ``general.alignment`` is added to the metadata when it is not the default.

    Raises:
        FormatError: a key or tensor name twice, a name too long, more than four dimensions, a
            value out of its type's range, an alignment that is not a power of two.
    """
    _check_alignment(alignment)
    entries = list(metadata)
    if alignment != DEFAULT_ALIGNMENT and all(e.key != "general.alignment" for e in entries):
        entries.append(KeyValue("general.alignment", ValueType.U32, alignment))
    _check_unique([entry.key for entry in entries], "metadata key")
    _check_unique([spec.name for spec in tensors], "tensor name")
    order = ">" if big_endian else "<"
    parts = [MAGIC, struct.pack(f"{order}IQQ", VERSION, len(tensors), len(entries))]
    for entry in entries:
        try:
            parts += pack_entry(entry, order)
        except (TypeError, ValueError, ArithmeticError) as e:  # a text where a number is needed...
            raise FormatError(
                f"metadata key {entry.key!r}: its value is no {entry.type.name} ({e})"
            ) from e
    relative = 0
    starts: list[int] = []
    for spec in tensors:
        parts += _pack_tensor_info(spec, relative, order)
        starts.append(relative)
        relative += padded(spec.nbytes, alignment)
    data = b"".join(parts)
    if tensors:
        data += bytes(padded(len(data), alignment) - len(data))
    return Header(data, tuple(len(data) + start for start in starts), len(data) + relative)


def padded(size: int, alignment: int) -> int:
    """Return ``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def pack_entry(entry: KeyValue, order: str = "<") -> list[bytes]:
    """Return the byte pieces of one metadata entry; ``order`` is ``<`` or ``>``."""
    head = _pack_string(entry.key, order) + struct.pack(f"{order}I", entry.type)
    if entry.type != ValueType.ARRAY:
        return [head, _pack_scalar(entry.key, entry.type, entry.value, order)]
    if entry.items is None or entry.items == ValueType.ARRAY:
        raise FormatError(
            f"metadata key {entry.key!r}: an array needs a scalar or string item type"
        )
    head += struct.pack(f"{order}IQ", entry.items, len(entry.value))
    if entry.items == ValueType.STRING:
        return [head, *_pack_strings(entry.value, order)]
    array = np.asarray(entry.value)
    if entry.items in _LIMITS and array.size:
        low, high = _LIMITS[entry.items]
        _check_range(entry.key, int(array.min()), low, high)
        _check_range(entry.key, int(array.max()), low, high)
    return [head, array.astype(order + SCALAR_CODES[entry.items]).tobytes()]


def _pack_scalar(key: str, kind: ValueType, value: Any, order: str) -> bytes:
    if kind == ValueType.STRING:
        return _pack_string(value, order)
    if kind == ValueType.BOOL:
        return b"\x01" if value else b"\x00"
    if kind in _LIMITS:
        _check_range(key, int(value), *_LIMITS[kind])
    with np.errstate(over="raise"):
        return np.array(value).astype(order + SCALAR_CODES[kind]).tobytes()


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def _pack_string(text: str | bytes, order: str) -> bytes:
    raw = _bytes(text)
    return struct.pack(f"{order}Q", len(raw)) + raw


def _pack_strings(texts: Sequence[str] | Sequence[bytes], order: str) -> list[bytes]:
    raws = [_bytes(text) for text in texts]
    lengths = np.fromiter((len(raw) for raw in raws), order + "u8", len(raws)).tobytes()
    parts: list[bytes] = []
    for index, raw in enumerate(raws):
        parts.append(lengths[index * 8 : index * 8 + 8])
        parts.append(raw)
    return parts


def _pack_tensor_info(spec: TensorSpec, offset: int, order: str) -> list[bytes]:
    raw = spec.name.encode("utf-8")
    if len(raw) > MAX_NAME_BYTES:
        raise FormatError(
            f"tensor {spec.name!r}: {len(raw)} bytes, GGUF names hold at most {MAX_NAME_BYTES}"
        )
    if not 1 <= len(spec.shape) <= MAX_DIMS:
        raise FormatError(
            f"tensor {spec.name!r}: shape {spec.shape}, GGUF holds 1 to {MAX_DIMS} dimensions"
        )
    dims = spec.shape[::-1]
    tail = struct.pack(f"{order}I{len(dims)}QIQ", len(dims), *dims, spec.type_id, offset)
    return [_pack_string(raw, order), tail]


def _check_alignment(alignment: int) -> None:
    if alignment < 8 or alignment & (alignment - 1):
        raise FormatError(f"alignment {alignment} is not a power of two of at least 8")


def _check_unique(names: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise FormatError(f"{what} {name!r} occurs twice")
        seen.add(name)


def _check_range(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise FormatError(f"metadata key {key!r}: {value} is outside {low}..{high}")
