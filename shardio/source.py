"""Byte sources: where the bytes of a tensor lie, and how they are fetched.

A ``Source`` is anything with random access to bytes. ``FileSource`` is a plain file read with
``pread``: no mmap, so that pages of the input never count as resident memory, and no shared file
position, so that any thread may read. Descriptors are opened on first use and kept in one bounded
pool, because a checkpoint can have thousands of files.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ..errors import FormatError

_MAX_OPEN = 128


class Source(Protocol):
    """Random access to bytes. ``path`` names the file for messages."""

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (bytes, contiguous) from ``offset``. Raises FormatError when short."""
        ...

    def locate(self, offset: int) -> tuple[FileSource, int] | None:
        """Return (file, position there) of byte ``offset`` when the bytes lie plainly in a file.

        Writers then copy them as they are. None for bytes that are compressed or in memory.
        """
        ...


def open_descriptor(path: Path) -> int:
    """Open a plain file for reading; unlike ``os.open`` never wait for the other end of a pipe.

    Raises:
        OSError: missing, unreadable, or not a plain file.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a plain file", str(path))


def open_file(path: Path) -> BinaryIO:
    """As ``open_descriptor``, as a buffered file object."""
    return os.fdopen(open_descriptor(path), "rb")


def read_small(path: Path) -> bytes:
    """Return what a small plain file holds. Raises OSError as ``open_descriptor``."""
    with open_file(path) as file:
        return file.read()


class _Handle:
    """An open descriptor; closed when the pool and the last reader let go of it."""

    __slots__ = ("fd",)

    def __init__(self, path: Path) -> None:
        self.fd = open_descriptor(path)

    def __del__(self) -> None:
        fd = getattr(self, "fd", -1)
        if fd >= 0:
            os.close(fd)


class _Pool:
    """Least-recently-used open files.

    Eviction drops a reference; a read in flight keeps its own.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _Handle] = OrderedDict()

    def get(self, path: Path) -> _Handle:
        with self._lock:
            handle = self._open.get(path)
            if handle is None:
                try:
                    handle = _Handle(path)
                except OSError as e:
                    raise FormatError(f"{path}: cannot be opened ({e.strerror})") from e
                self._open[path] = handle
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return handle

    def forget(self, path: Path, now: os.stat_result) -> None:
        """Close what was opened under ``path``, if another file is there now."""
        with self._lock:
            handle = self._open.get(path)
            if handle is not None and not os.path.samestat(os.fstat(handle.fd), now):
                del self._open[path]

    def clear(self) -> None:
        with self._lock:
            self._open.clear()


_POOL = _Pool(_MAX_OPEN)


@dataclass(frozen=True, slots=True)
class FileSource:
    """A plain file.

    Attributes:
        path: the file.
        size: its length in bytes when it was opened.
    """

    path: Path
    size: int

    @classmethod
    def of(cls, path: Path) -> FileSource:
        """Stat the file. Raises FormatError when it is missing or unreadable."""
        try:
            now = path.stat()
        except OSError as e:
            raise FormatError(f"{path}: cannot be opened ({e.strerror})") from e
        _POOL.forget(path, now)
        return cls(path, now.st_size)

    def locate(self, offset: int) -> tuple[FileSource, int]:
        """The file itself and the same offset."""
        return self, offset

    def handle(self) -> _Handle:
        """Return an object whose ``fd`` stays open as long as it is referenced."""
        return _POOL.get(self.path)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset``.

        Raises:
            FormatError: the file ends early, or the device fails.
        """
        handle = self.handle()
        done, want = 0, len(buffer)
        while done < want:
            try:
                n = os.preadv(handle.fd, [buffer[done:]], offset + done)
            except OSError as e:
                raise FormatError(
                    f"{self.path}: read error at byte {offset + done} ({e.strerror})"
                ) from e
            if n == 0:
                raise FormatError(
                    f"{self.path}: file ends at byte {offset + done}, "
                    f"{want - done} bytes before the end of the tensor data"
                )
            done += n

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return ``nbytes`` bytes from ``offset`` (for headers and metadata)."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise FormatError(
                f"{self.path}: bytes {offset}..{offset + nbytes} lie outside the file "
                f"({self.size} bytes)"
            )
        out = bytearray(nbytes)
        self.readinto(offset, memoryview(out))
        return bytes(out)


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Bytes already in memory: small tensors that were computed or unpacked."""

    path: Path
    data: bytes

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.data)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``."""
        end = offset + len(buffer)
        if end > len(self.data):
            raise FormatError(f"{self.path}: {end - len(self.data)} bytes missing at the end")
        buffer[:] = self.data[offset:end]

    def locate(self, offset: int) -> None:
        """Not in a file."""


def close_files() -> None:
    """Close all pooled descriptors (tests that delete their inputs; long-lived processes)."""
    _POOL.clear()
