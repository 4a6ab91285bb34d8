"""TensorFlow's TensorBundle: the index (a LevelDB table of protobuf entries) and raw data files.

``prefix.index`` maps keys to entries (dtype, shape, data file, offset, size, crc32c, slices), in
blocks with shared key prefixes; ``prefix.data-0000i-of-0000n`` hold plain bytes. Partitioned
variables have an entry without data and one per slice, under an ordered encoding of its place.
Source: TensorFlow ``tensor_bundle.{h,cc,proto}``, ``saved_tensor_slice_util.cc``, LevelDB
``table_format.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import ml_dtypes
import numpy as np

from ..errors import FormatError, UnsupportedError
from .checksums import Checksum
from .chunked import Chunked
from .crc32c import crc32c, masked
from .protobuf import Fields, fields, first, signed, varint
from .source import FileSource, open_file, read_small

MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_MAX_INDEX = 512 << 20
STRING = 7
_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<i4"), 4: np.dtype("u1"),
    5: np.dtype("<i2"), 6: np.dtype("i1"), 9: np.dtype("<i8"), 10: np.dtype("?"),
    14: np.dtype(ml_dtypes.bfloat16), 17: np.dtype("<u2"), 19: np.dtype("<f2"),
    22: np.dtype("<u4"), 23: np.dtype("<u8"), 24: np.dtype(ml_dtypes.float8_e5m2),
    25: np.dtype(ml_dtypes.float8_e4m3fn),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One key: TensorFlow's dtype number, shape, place of the bytes, and slices if it is cut."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    slices: tuple[tuple[tuple[int, int], ...], ...]  # (start, length) per dim, -1: whole dim
    crc: int = 0  # masked CRC-32C of the bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened index.

    Attributes:
        prefix: path without ``.index``.
        entries: by key (bytes: keys of slices are no text).
        shards: the data files.
    """

    prefix: Path
    entries: dict[bytes, Entry]
    shards: tuple[FileSource, ...]

    def names(self) -> list[str]:
        """Keys of whole tensors."""
        return [k.decode() for k in self.entries if not k.startswith(b"\0")]

    def tensor(self, name: str) -> Chunked:
        """Return a tensor; slices are put in their places.

        Raises:
            FormatError: missing slices, bytes outside the file.
            UnsupportedError: strings and other types that are no numbers.
        """
        entry = self.entries[name.encode()]
        if not entry.slices:
            return self._at(name, entry, entry.shape)
        chunks = []
        dtype = self._dtype(name, entry)
        for cut in entry.slices:
            key = _slice_key(name, cut)
            part = self.entries.get(key)
            if part is None:
                self._fail(f"{name!r} has a slice {cut} that is not in the index")
            if len(cut) != len(entry.shape):
                self._fail(f"{name!r} has a slice of {len(cut)} dims, not {len(entry.shape)}")
            lo = tuple(start for start, _ in cut)
            sizes = [n if size < 0 else size for (_, size), n in zip(cut, entry.shape, strict=True)]
            piece = self._at(name, part, sizes)
            chunks += [c.moved(lo) for c in piece.chunks]
        return Chunked(entry.shape, dtype, chunks)

    def checksums(self) -> tuple[Checksum, ...]:
        """Checksums of all numeric tensors and slices (strings have one of another kind)."""
        return tuple(
            Checksum(
                key.decode("utf-8", "backslashreplace"),
                self.shards[entry.shard].path,
                entry.offset,
                entry.size,
                "CRC-32C",
                entry.crc,
            )
            for key, entry in self.entries.items()
            if entry.dtype != STRING and entry.size and entry.shard < len(self.shards)
        )

    def string(self, name: str) -> bytes:
        """Return the only element of a string tensor (varint length, crc, bytes)."""
        entry = self.entries[name.encode()]
        source = self._source(name, entry)
        if entry.dtype != STRING or entry.size > _MAX_INDEX:
            self._fail(f"{name!r} is no string")
        with source.path.open("rb") as file:
            file.seek(entry.offset)
            raw = file.read(entry.size)
        length, at = varint(raw, 0)
        if at + 4 + length != len(raw):
            self._fail(f"{name!r}: a string of {length} bytes does not fit its {entry.size}")
        return raw[at + 4 :]

    def _at(self, name: str, entry: Entry, shape: Sequence[int]) -> Chunked:
        dtype = self._dtype(name, entry)
        source = self._source(name, entry)
        need = dtype.itemsize
        for n in shape:
            need *= n
        if need != entry.size:
            self._fail(f"{name!r} {list(shape)} needs {need} bytes, its entry has {entry.size}")
        return Chunked.contiguous(source, entry.offset, shape, dtype)

    def _source(self, name: str, entry: Entry) -> FileSource:
        if entry.shard >= len(self.shards):
            self._fail(f"{name!r} is in data file {entry.shard} of {len(self.shards)}")
        source = self.shards[entry.shard]
        if entry.offset + entry.size > source.size:
            self._fail(
                f"truncated: {name!r} ends at byte {entry.offset + entry.size} of "
                f"{source.path.name}, which has {source.size}"
            )
        return source

    def _dtype(self, name: str, entry: Entry) -> np.dtype:
        if entry.dtype not in _DTYPES:
            raise UnsupportedError(f"{self.prefix}: {name!r} has TensorFlow type {entry.dtype}")
        return _DTYPES[entry.dtype]

    def _fail(self, problem: str) -> NoReturn:
        raise FormatError(f"{self.prefix}.index: {problem}")


def is_index(path: Path) -> bool:
    """Whether a file ends with the magic number of a table."""
    try:
        with open_file(path) as file:
            file.seek(0, 2)
            size = file.tell()
            if size < _FOOTER:
                return False
            file.seek(size - 8)
            return int.from_bytes(file.read(8), "little") == MAGIC
    except (OSError, ValueError):  # a name from a damaged file may hold a null byte
        return False


def open_bundle(prefix: Path) -> Bundle:
    """Read an index and find its data files.

    Raises:
        FormatError: damaged index, missing data files.
        UnsupportedError: compressed blocks, big-endian data.
    """
    index = prefix.with_name(prefix.name + ".index")
    raw = read_small(index) if index.stat().st_size <= _MAX_INDEX else b""
    try:
        table = dict(_table(raw))
        header = fields(table.pop(b""))
        count = first(header, 1, 0)
        for key in table:
            if not key.startswith(b"\0"):
                key.decode()
        entries = {key: _entry(value) for key, value in table.items()}
    except (ValueError, KeyError, IndexError) as e:
        raise FormatError(f"{index}: the table is damaged ({e})") from e
    if first(header, 2, 0):
        raise UnsupportedError(f"{index}: written on a big-endian machine")
    if not 0 < count < 100_000:
        raise FormatError(f"{index}: says there are {count} data files")
    files = [prefix.with_name(f"{prefix.name}.data-{i:05d}-of-{count:05d}") for i in range(count)]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise FormatError(f"{prefix.parent}: data files are missing: {', '.join(missing[:8])}")
    return Bundle(prefix, entries, tuple(FileSource.of(f) for f in files))


def _table(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(raw) < _FOOTER or int.from_bytes(raw[-8:], "little") != MAGIC:
        raise ValueError("no magic number at its end")
    footer = raw[-_FOOTER:]
    at = 0
    for _ in range(2):
        _, at = varint(footer, at)
    offset, at = varint(footer, at)
    size, _ = varint(footer, at)
    for _, handle in _block(raw, offset, size):
        start, at = varint(handle, 0)
        length, _ = varint(handle, at)
        yield from _block(raw, start, length)


def _block(raw: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of a block; keys share prefixes with the one before."""
    if size < 4 or offset + size + 5 > len(raw) - _FOOTER + 5:
        raise ValueError(f"a block of {size} bytes at {offset} lies outside the file")
    stored = int.from_bytes(raw[offset + size + 1 : offset + size + 5], "little")
    if masked(crc32c(raw[offset : offset + size + 1])) != stored:
        raise ValueError(f"the checksum of the block at byte {offset} does not match")
    if raw[offset + size] != 0:
        raise UnsupportedError(f"an index block is compressed (type {raw[offset + size]})")
    data = raw[offset : offset + size]
    end = len(data) - 4 - 4 * int.from_bytes(data[-4:], "little")
    if end < 0:
        raise ValueError("a block has more restarts than bytes")
    at, key = 0, b""
    while at < end:
        shared, at = varint(data, at)
        own, at = varint(data, at)
        length, at = varint(data, at)
        if shared > len(key) or at + own + length > end:
            raise ValueError("an entry reaches outside its block")
        key = key[:shared] + data[at : at + own]
        yield key, data[at + own : at + own + length]
        at += own + length


def _entry(value: bytes) -> Entry:
    found = fields(value)
    slices = tuple(_extents(fields(s)) for s in found.get(7, []) if isinstance(s, bytes))
    return Entry(
        dtype=first(found, 1, 0),
        shape=tuple(_dims(found)),
        shard=first(found, 3, 0),
        offset=first(found, 4, 0),
        size=first(found, 5, 0),
        slices=slices,
        crc=first(found, 6, 0),
    )


def _dims(found: Fields) -> Iterator[int]:
    for shape in found.get(2, []):
        if isinstance(shape, bytes):
            for dim in fields(shape).get(2, []):
                size = signed(first(fields(dim), 1, 0)) if isinstance(dim, bytes) else 0
                if not 0 <= size < 2**48:
                    raise ValueError(f"a dim of {size}")
                yield size


def _extents(found: Fields) -> tuple[tuple[int, int], ...]:
    """(start, length) per dim of a TensorSliceProto; without length the whole dim."""
    out = []
    for extent in found.get(1, []):
        inner = fields(extent) if isinstance(extent, bytes) else {}
        out.append((first(inner, 1, 0), first(inner, 2, -1)))
    return tuple(out)


def _slice_key(name: str, cut: Sequence[tuple[int, int]]) -> bytes:
    """The ordered encoding of (0, name, dims, start, length, ...)."""
    escaped = name.encode().replace(b"\0", b"\0\xff").replace(b"\xff", b"\xff\0")
    key = _number(0) + escaped + b"\0\x01" + _number(len(cut))
    for start, length in cut:
        key += _signed(start) + _signed(length)
    return key


def _number(value: int) -> bytes:
    """OrderedCode::WriteNumIncreasing: length byte, then big-endian bytes."""
    raw = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes([len(raw)]) + raw


def _signed(value: int) -> bytes:
    """OrderedCode::WriteSignedNumIncreasing: as many leading ones as bytes; negative numbers are
    the inverse of their complement.
    """
    if value < 0:
        return bytes(b ^ 0xFF for b in _signed(~value))
    length = 1
    while value >= 1 << (7 * length - 1):
        length += 1
    ones = ((1 << length) - 1) << (7 * length)
    return (value | ones).to_bytes(length, "big")
