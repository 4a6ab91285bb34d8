"""Open GGUF files: metadata, tensor infos and tensor bytes, one file or a whole split set.

Format: ggml's GGUF v2 and v3 in either byte order; splits are named ``NAME-00001-of-00003.gguf``
and carry ``split.no``, ``split.count`` and ``split.tensors.count``. Nothing but the header is read:
tensor data stays in the file until a tensor is asked for.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ...errors import FormatError, QuantError, UnsupportedError
from ...quant.types import GgmlType, type_by_id
from .scan import MIN_ENTRY_BYTES, MIN_INFO_BYTES, Cursor
from .values import KeyValue
from .writer import DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, MAX_NAME_BYTES, padded

_PLAIN = {
    "F32": "f4", "F16": "f2", "F64": "f8", "BF16": "u2",
    "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8",
}  # fmt: skip

_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is: ``shape`` is row-major, ``offset`` counts bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An open GGUF model: of several files when it was split (metadata is the first file's)."""

    paths: tuple[Path, ...]
    version: int
    big_endian: bool
    alignment: int
    entries: Mapping[str, KeyValue]
    tensors: Mapping[str, TensorInfo]

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> Any:
        """Return a metadata value. Raises KeyError when the file has no such key."""
        return self.entries[key].value

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value, or ``default``."""
        return self.entries[key].value if key in self.entries else default

    def raw(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor as a read-only uint8 array mapped from the file."""
        info = self.tensors[name]
        if not info.nbytes:
            return np.empty(0, np.uint8)
        return np.memmap(info.path, np.uint8, "r", info.offset, (info.nbytes,))

    def array(self, name: str) -> np.ndarray:
        """Return an unquantized tensor as a mapped array of its shape and dtype.

        Raises:
            UnsupportedError: the tensor is quantized.
        """
        info = self.tensors[name]
        code = _PLAIN.get(info.type.name)
        if code is None:
            raise UnsupportedError(
                f"{info.path}: tensor {name!r} is {info.type.name}, not a plain array"
            )
        values = self.raw(name).view((">" if self.big_endian else "<") + code).reshape(info.shape)
        if info.type.name == "BF16":
            return values.astype("<u2", copy=False).view(ml_dtypes.bfloat16)
        return values


def open_gguf(path: str | Path, *, follow_splits: bool = True) -> GgufFile:
    """Open a GGUF file, or all files of a split set when given any one of them.

    Args:
        path: the file.
        follow_splits: open the sister files too; without it only this file's tensors are listed.

    Raises:
        FormatError: not GGUF, truncated, inconsistent, or a file of the split set is missing.
        UnsupportedError: a version or tensor type that this reader does not know.
    """
    path = Path(path)
    single = _open_one(path)
    count = int(single.get("split.count", 1))
    if not follow_splits or count <= 1:
        return single
    return _merge_splits(path, single, count)


def _open_one(path: Path) -> GgufFile:
    buffer = _map(path)
    cursor = Cursor(buffer, path)
    version, n_tensors, n_entries = _read_start(cursor)
    entries: dict[str, KeyValue] = {}
    for _ in range(n_entries):
        entry = cursor.entry()
        if entry.key in entries:
            raise cursor.fail(f"metadata key {entry.key!r} occurs twice")
        entries[entry.key] = entry
    alignment = _alignment(cursor, entries)
    found = [_read_info(cursor) for _ in range(n_tensors)]
    base = padded(cursor.position, alignment)
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} occurs twice")
        tensors[name] = _place(cursor, name, shape, kind, offset, base, alignment)
    _check_overlap(path, tensors)
    return GgufFile((path,), version, cursor.order == ">", alignment, entries, tensors)


def _map(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) < 24:
                raise FormatError(f"{path}: not a GGUF file: shorter than a GGUF header")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error


def _read_start(cursor: Cursor) -> tuple[int, int, int]:
    """Check magic and version, find the byte order, return version and the two counts."""
    if bytes(cursor.buffer[:4]) != MAGIC:
        raise FormatError(
            f"{cursor.path}: not a GGUF file: it starts with {bytes(cursor.buffer[:4])!r}"
        )
    cursor.position = 4
    version = cursor.unpack("I")
    if version & 0xFFFF == 0 and version:
        cursor.order = ">"
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in (2, 3):
        raise UnsupportedError(
            f"{cursor.path}: GGUF version {version} is not read (2 and 3 are): convert again"
        )
    n_tensors, n_entries = cursor.unpack("Q"), cursor.unpack("Q")
    if n_tensors > cursor.left // MIN_INFO_BYTES or n_entries > cursor.left // MIN_ENTRY_BYTES:
        raise cursor.fail(
            f"the header claims {n_tensors} tensors and {n_entries} metadata entries, "
            f"more than {cursor.size} bytes can hold"
        )
    return version, n_tensors, n_entries


def _alignment(cursor: Cursor, entries: Mapping[str, KeyValue]) -> int:
    entry = entries.get("general.alignment")
    if entry is None:
        return DEFAULT_ALIGNMENT
    value = entry.value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value & (value - 1):
        raise cursor.fail(f"general.alignment is {value!r}, not a power of two")
    return value


def _read_info(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text("a tensor name", MAX_NAME_BYTES)
    n_dims = cursor.unpack("I")
    if n_dims > MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions, GGUF holds at most {MAX_DIMS}")
    shape = tuple(cursor.unpack("Q") for _ in range(n_dims))[::-1]
    return name, shape, cursor.unpack("I"), cursor.unpack("Q")


def _place(
    cursor: Cursor,
    name: str,
    shape: tuple[int, ...],
    type_id: int,
    offset: int,
    base: int,
    alignment: int,
) -> TensorInfo:
    try:
        kind = type_by_id(type_id)
        nbytes = prod(shape[:-1]) * kind.row_bytes(shape[-1] if shape else 1)
    except QuantError as error:
        raise UnsupportedError(f"{cursor.path}: tensor {name!r}: {error}") from error
    if offset % alignment:
        raise cursor.fail(f"tensor {name!r}: offset {offset} is not a multiple of {alignment}")
    if base + offset + nbytes > cursor.size:
        raise FormatError(
            f"{cursor.path}: tensor {name!r} ends at byte {base + offset + nbytes}, the file has "
            f"{cursor.size}; it is truncated, copy or convert it again"
        )
    return TensorInfo(name, shape, kind, cursor.path, base + offset, nbytes)


def _check_overlap(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset < end:
            raise FormatError(
                f"{path}: tensors {before!r} and {info.name!r} overlap; the file is damaged"
            )
        end, before = info.offset + info.nbytes, info.name


def _split_paths(path: Path, count: int) -> Iterator[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise FormatError(
            f"{path}: is one of {count} split files: name it NAME-00001-of-{count:05d}.gguf"
        )
    for number in range(1, count + 1):
        yield path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")


def _merge_splits(path: Path, opened: GgufFile, count: int) -> GgufFile:
    paths = tuple(_split_paths(path, count))
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise FormatError(f"{path}: the split set of {count} files lacks {', '.join(missing)}")
    files = [opened if p == path else _open_one(p) for p in paths]
    tensors: dict[str, TensorInfo] = {}
    for number, file in enumerate(files):
        if (file.get("split.no"), file.get("split.count")) != (number, count):
            raise FormatError(
                f"{file.paths[0]}: says it is split {file.get('split.no')} of "
                f"{file.get('split.count')}, its name says {number} of {count} (counted from 0); "
                "give the files their own names back"
            )
        for name, info in file.tensors.items():
            if name in tensors:
                raise FormatError(
                    f"{info.path}: tensor {name!r} is also in {tensors[name].path.name}"
                )
            tensors[name] = info
    total = files[0].get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise FormatError(
            f"{path}: the split set holds {len(tensors)} tensors, its header says {total}"
        )
    first = files[0]
    return GgufFile(paths, first.version, first.big_endian, first.alignment, first.entries, tensors)
