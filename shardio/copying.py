"""Bytes from file to file: by the kernel where that is cheapest, else through a small buffer."""

from __future__ import annotations

import errno
import os
import threading

from .source import FileSource

_NO_KERNEL_COPY = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
}
_PAGE = 4096
_COPY_BUFFER = 1 << 20  # stays in the cache of one core
_local = threading.local()


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``; one call of the kernel may write less. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def copy_bytes(source: FileSource, position: int, fd: int, offset: int, nbytes: int) -> None:
    """Copy bytes between files.

    The kernel does it alone (or shares the blocks, where the file system can) when both ends lie
    alike in their pages. Otherwise it would split every page in two, which costs about twice as
    much as going through a small buffer here.

    Args:
        source: the file to copy from.
        position: first byte there.
        fd: output descriptor.
        offset: first byte in the output.
        nbytes: how many.

    Raises:
        FormatError: the source ends early.
        OSError: the output cannot be written.
    """
    done = 0
    if hasattr(os, "copy_file_range") and (position - offset) % _PAGE == 0:
        handle = source.handle()
        while done < nbytes:
            try:
                n = os.copy_file_range(handle.fd, fd, nbytes - done, position + done, offset + done)
            except OSError as e:
                if e.errno in _NO_KERNEL_COPY:
                    break
                raise
            if n == 0:
                break  # the source ends (the read below says where), or the file system will not
            done += n
    while done < nbytes:
        buffer = _copy_buffer()[: nbytes - done]
        source.readinto(position + done, buffer)
        pwrite(fd, buffer, offset + done)
        done += len(buffer)


def _copy_buffer() -> memoryview:
    buffer: memoryview | None = getattr(_local, "buffer", None)
    if buffer is None:
        buffer = _local.buffer = memoryview(bytearray(_COPY_BUFFER))
    return buffer
