"""Checksums that formats keep of their tensor bytes, and reading the bytes to prove them.

torch.save archives have a CRC-32 of every entry (0 where the saver left them out), alone in a file
or one after the other as in ``.distcp`` files; TensorBundle has a masked CRC-32C of every tensor.
safetensors, Zarr v2 and numpy keep none. Source: APPNOTE.TXT of PKWARE, ``tensor_bundle.proto``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .crc32c import crc32c, masked
from .source import FileSource
from .torchzip import FileSlice, ZipDirectory, archive_start

_PIECE = 1 << 20
_KINDS: dict[str, Callable[[bytes | memoryview, int], int]] = {
    "CRC-32": zlib.crc32,
    "CRC-32C": crc32c,
}


@dataclass(frozen=True, slots=True)
class Checksum:
    """What a format says about a range of bytes.

    Attributes:
        name: the entry or tensor.
        path: the file.
        offset, nbytes: the range.
        kind: ``CRC-32`` or ``CRC-32C`` (masked).
        value: as stored.
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    kind: str
    value: int


def archive_checksums(path: Path) -> list[Checksum]:
    """Return the checksums of all torch.save archives of a file, in file order.

    The last archive must end where the file ends; those before are found from the last to the
    first. A file that is no archive has none.

    Raises:
        FormatError: unreadable, or an archive whose directory is damaged.
    """
    source = FileSource.of(path)
    handle = source.handle()
    found: list[Checksum] = []
    end = source.size
    while end > 0:
        start = archive_start(handle.fd, end)
        if start is None:
            break
        directory = ZipDirectory(FileSlice(handle.fd, path, start, end - start))
        for entry in directory.entries.values():
            if entry.crc and not entry.method:
                at = start + directory.locate(entry)
                found.append(Checksum(entry.name, path, at, entry.size, "CRC-32", entry.crc))
        end = start
    return sorted(found, key=lambda c: c.offset)


def _pieces(checksum: Checksum) -> Iterator[memoryview]:
    """Yield the bytes of a range. Raises FormatError when the file is short."""
    source = FileSource.of(checksum.path)
    buffer = memoryview(bytearray(min(_PIECE, checksum.nbytes)))
    for at in range(0, checksum.nbytes, _PIECE):
        part = buffer[: min(_PIECE, checksum.nbytes - at)]
        source.readinto(checksum.offset + at, part)
        yield part


def mismatch(checksum: Checksum) -> str | None:
    """Read a range; return what is wrong with it in words, or None when it is as it was written.

    Raises:
        FormatError: the file is short or unreadable.
    """
    value = 0
    for part in _pieces(checksum):
        value = _KINDS[checksum.kind](part, value)
    if checksum.kind == "CRC-32C":
        value = masked(value)
    if value == checksum.value:
        return None
    return (
        f"{checksum.path}: bytes {checksum.offset}..{checksum.offset + checksum.nbytes} "
        f"({checksum.name}) have {checksum.kind} {value:08x}, {checksum.value:08x} was written: "
        "they changed on the disk or on the way; copy the file again"
    )
