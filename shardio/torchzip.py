"""The directory of a torch.save zip, read without touching tensor bytes.

Format: APPNOTE.TXT of PKWARE (end record, zip64 end record, central directory, local headers) as
torch's writer uses it: stored entries only, one root folder, data aligned by padding in the local
header. The archive may lie anywhere in a larger file, as the items of a ``.distcp`` do; offsets
inside it count from its own start.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..errors import FormatError

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_DIRECTORY = 1 << 30
_MAX_COMMENT = 0xFFFF
_EDGE = 4096  # bytes cached at both ends: small archives need no further read


class FileSlice:
    """Part of a file, read with pread; the edges are cached. Positions count from its start."""

    def __init__(self, fd: int, path: Path, offset: int, length: int) -> None:
        self.fd, self.path, self.offset, self.length = fd, path, offset, length
        self._head = os.pread(fd, min(_EDGE, length), offset)
        self._tail_at = max(0, length - _EDGE)
        self._tail = os.pread(fd, length - self._tail_at, offset + self._tail_at)

    def read(self, start: int, count: int) -> bytes:
        """Return ``count`` bytes at ``start``. Raises FormatError outside the slice."""
        end = start + count
        if start < 0 or count < 0 or end > self.length:
            self.fail(f"truncated: bytes {start} to {end} are needed, it has {self.length}")
        if end <= len(self._head):
            return self._head[start:end]
        if start >= self._tail_at:
            return self._tail[start - self._tail_at : end - self._tail_at]
        data = os.pread(self.fd, count, self.offset + start)
        while len(data) < count:  # pread may stop early, at the latest at 2 GB
            more = os.pread(self.fd, count - len(data), self.offset + start + len(data))
            if not more:
                self.fail(f"it ended while bytes {start} to {end} were read")
            data += more
        return data

    def fail(self, problem: str) -> NoReturn:
        """Raise a FormatError naming the file, and the position of an embedded archive."""
        place = f" (item at byte {self.offset})" if self.offset else ""
        raise FormatError(f"{self.path}{place}: {problem}")


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One entry: name, bytes in the archive, bytes unpacked, method (0 stored), header position,
    CRC-32 of the unpacked bytes (0 when it was not computed).
    """

    name: str
    packed: int
    size: int
    method: int
    header: int
    crc: int = 0


class ZipDirectory:
    """The entries of an archive by name, checked to lie inside it without overlap."""

    def __init__(self, source: FileSlice) -> None:
        self.source = source
        start, size, count = _find_directory(source)
        self.entries = _read_entries(source, source.read(start, size), count)
        self._starts = sorted(e.header for e in self.entries.values())
        self._directory = start
        end = 0
        for e in sorted(self.entries.values(), key=lambda e: e.header):
            if e.header < end or e.header + _LOCAL.size + e.packed > start:
                source.fail(f"zip entry {e.name!r} overlaps another one or the directory")
            end = e.header + _LOCAL.size + e.packed

    def locate(self, entry: ZipEntry) -> int:
        """Return the position of an entry's first data byte within the archive."""
        source = self.source
        raw = source.read(entry.header, _LOCAL.size)
        magic, *_, name_size, extra_size = _LOCAL.unpack(raw)
        if magic != b"PK\x03\x04":
            source.fail(f"zip entry {entry.name!r} has no local header at {entry.header}")
        if source.read(entry.header + _LOCAL.size, name_size) != entry.name.encode("utf-8"):
            source.fail(f"zip entry {entry.name!r} has another name in its local header")
        start = entry.header + _LOCAL.size + name_size + extra_size
        after = bisect_right(self._starts, entry.header)
        limit = self._starts[after] if after < len(self._starts) else self._directory
        if start + entry.packed > limit:
            source.fail(f"zip entry {entry.name!r} overlaps the next one or the directory")
        return start

    def stored(self, entry: ZipEntry) -> int:
        """Like ``locate``, for an entry whose bytes lie there uncompressed, or FormatError."""
        if entry.method != 0 or entry.packed != entry.size:
            self.source.fail(
                f"zip entry {entry.name!r} is compressed; torch stores uncompressed, "
                "so the archive was repacked: unpack it and zip it again with 'zip -0'"
            )
        return self.locate(entry)

    def read(self, entry: ZipEntry, limit: int) -> bytes:
        """Return an entry's content, at most ``limit`` bytes (metadata only)."""
        if entry.size > limit:
            self.source.fail(f"zip entry {entry.name!r} has {entry.size} bytes, limit {limit}")
        return self.source.read(self.stored(entry), entry.size)


def archive_start(fd: int, end: int) -> int | None:
    """Return where the archive begins that ends at byte ``end`` of a file, or None if none does.

    Archives with a comment are not looked for: torch writes none.
    """
    at = end - _END.size
    if at < 0:
        return None
    magic, *_, size, start, comment = _END.unpack(os.pread(fd, _END.size, at))
    if magic != b"PK\x05\x06" or comment:
        return None
    if at >= _LOCATOR64.size:
        locator = os.pread(fd, _LOCATOR64.size, at - _LOCATOR64.size)
        if locator[:4] == b"PK\x06\x07":
            at -= _LOCATOR64.size + _END64.size
            record = _END64.unpack(os.pread(fd, _END64.size, at)) if at >= 0 else (b"",)
            if record[0] != b"PK\x06\x06":
                return None
            size, start = record[8:10]
    found: int = at - size - start
    return found if found >= 0 else None


def _find_directory(source: FileSlice) -> tuple[int, int, int]:
    """Return (start, bytes, entries) of the central directory from the end records."""
    tail_at = max(0, source.length - _END.size)
    tail = source.read(tail_at, source.length - tail_at)
    at = 0 if tail[:4] == b"PK\x05\x06" else -1
    if at < 0:  # an archive comment may follow
        tail_at = max(0, source.length - _END.size - _MAX_COMMENT)
        tail = source.read(tail_at, source.length - tail_at)
        at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        source.fail(
            f"truncated: {source.length} bytes without the zip directory that belongs at the end; "
            "the save or the copy did not finish"
        )
    end_at = tail_at + at
    _, _, _, _, count, size, start, comment = _END.unpack_from(tail, at)
    if end_at + _END.size + comment > source.length:
        source.fail("truncated: the zip comment is cut off")
    locator_at = end_at - _LOCATOR64.size
    if locator_at >= 0:
        magic, _, end64_at, _ = _LOCATOR64.unpack(source.read(locator_at, _LOCATOR64.size))
        if magic == b"PK\x06\x07":
            record = _END64.unpack(source.read(end64_at, _END64.size))
            if record[0] != b"PK\x06\x06":
                source.fail("the zip64 end record is missing")
            count, size, start = record[7:10]
            end_at = end64_at
    if start + size > end_at or size > _MAX_DIRECTORY:
        source.fail(f"truncated or damaged: the zip directory ({size} bytes) is not at {start}")
    return start, size, count


def _read_entries(source: FileSlice, raw: bytes, count: int) -> dict[str, ZipEntry]:
    entries: dict[str, ZipEntry] = {}
    at = 0
    while at < len(raw):
        if at + _CENTRAL.size > len(raw) or raw[at : at + 4] != b"PK\x01\x02":
            source.fail("the zip directory is damaged")
        fields = _CENTRAL.unpack_from(raw, at)
        flags, method = fields[3:5]
        packed, size, name_n, extra_n, comment_n = fields[8:13]
        header = fields[16]
        at += _CENTRAL.size
        after = at + name_n + extra_n + comment_n
        if after > len(raw):
            source.fail("the zip directory is damaged")
        try:
            name = raw[at : at + name_n].decode("utf-8")
        except UnicodeDecodeError:
            source.fail("a zip entry has a name that is not UTF-8")
        if 0xFFFFFFFF in (packed, size, header):
            extra = raw[at + name_n : at + name_n + extra_n]
            size, packed, header = _zip64(source, extra, size, packed, header)
        at = after
        parts = name.split("/")
        if name in entries or ".." in parts or "\\" in name or not parts[0]:
            source.fail(f"zip entry {name[:100]!r} is a duplicate or leaves the archive")
        if flags & 1:
            source.fail(f"zip entry {name[:100]!r} is encrypted")
        entries[name] = ZipEntry(name, packed, size, method, header, fields[7])
    if len(entries) != count:
        source.fail(f"the zip directory has {len(entries)} entries instead of {count}")
    return entries


def _zip64(
    source: FileSlice, extra: bytes, size: int, packed: int, header: int
) -> tuple[int, int, int]:
    """Replace saturated 32-bit fields by those of the zip64 extra field (id 1), in its order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1 and at + 4 + length <= len(extra):
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            fields = [size, packed, header]
            for i, value in enumerate(fields):
                if value == 0xFFFFFFFF and wide:
                    fields[i] = wide.pop(0)
            return fields[0], fields[1], fields[2]
        at += 4 + length
    return source.fail("a zip64 entry lacks its sizes")
