"""A compressed file seen as its plain bytes, unpacked at the first read.

zstd (package ``zstandard``), zlib and gzip, as zarr arrays use them.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import FormatError, UnsupportedError
from .source import FileSource, open_file
from .spill import SPILLS, Spill

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A source of the unpacked bytes.

    Attributes:
        path: the compressed file.
        codec: ``zstd``, ``zlib`` or ``gzip``.
        size: bytes after unpacking; more or fewer are refused.
    """

    path: Path
    codec: str
    size: int

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``. Raises FormatError for damaged data."""
        SPILLS.get((self.path, self.codec), self._unpack).readinto(offset, buffer)

    def locate(self, offset: int) -> tuple[FileSource, int] | None:
        """The bytes lie plainly nowhere."""
        return None

    def _unpack(self) -> Spill:
        try:
            packed = open_file(self.path)
        except OSError as e:
            raise FormatError(f"{self.path}: cannot be opened ({e.strerror})") from e
        with tempfile.TemporaryFile(prefix="mconv-") as out, packed as file:
            total = 0
            for block in _blocks(self.path, file, self.codec):
                total += len(block)
                if total > self.size:
                    break
                out.write(block)
            if total != self.size:
                raise FormatError(f"{self.path}: does not unpack to {self.size} bytes")
            out.flush()
            return Spill(self.path, os.dup(out.fileno()), 0)


def unpack_chunk(path: Path, compressor: object, nbytes: int) -> PackedFile:
    """Return the source of a zarr chunk file.

    Raises:
        FormatError: the file is missing.
        UnsupportedError: another codec, or zstd without its package.
    """
    codec = compressor.get("id") if isinstance(compressor, Mapping) else compressor
    if codec not in ("zstd", "zlib", "gzip"):
        raise UnsupportedError(
            f"{path}: is compressed with {codec!r}; zstd, zlib and gzip are read"
        )
    if codec == "zstd":
        try:
            import zstandard  # noqa: F401
        except ImportError as e:
            raise UnsupportedError(
                f"{path}: is compressed with zstd, which needs the package zstandard: "
                "pip install 'mconv[zstd]'"
            ) from e
    return PackedFile(FileSource.of(path).path, str(codec), nbytes)


def _blocks(path: Path, file: BinaryIO, codec: str) -> Iterator[bytes]:
    if codec == "zstd":
        import zstandard

        try:
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            while block := reader.read(_BLOCK):
                yield block
        except zstandard.ZstdError as e:
            raise FormatError(f"{path}: damaged zstd data ({e})") from None
        return
    inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        while block := file.read(_BLOCK):
            data = inflate.decompress(block, _BLOCK)
            while data:
                yield data
                data = inflate.decompress(inflate.unconsumed_tail, _BLOCK)
    except zlib.error as e:
        raise FormatError(f"{path}: damaged {codec} data ({e})") from None
