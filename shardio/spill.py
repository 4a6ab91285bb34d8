"""Compressed pieces of files, unpacked into temporary files that have no name.

Regions of a tensor are read in any order and from several threads, while compressed data can only
be read from its start: the last few unpacked pieces are kept on disk, never in memory.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from ..errors import FormatError

_MAX_SPILLS = 16  # unpacked pieces kept at once


class Spill:
    """An unpacked piece in a temporary file that has no name any more."""

    __slots__ = ("_base", "_fd", "_path")

    def __init__(self, path: Path, fd: int, base: int) -> None:
        """``fd`` is closed with the object; ``base`` is the position of the first byte."""
        self._path, self._fd, self._base = path, fd, base

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` of the tensor."""
        done = 0
        while done < len(buffer):
            n = os.preadv(self._fd, [buffer[done:]], self._base + offset + done)
            if n == 0:
                raise FormatError(f"{self._path}: an unpacked item is short")
            done += n

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._fd)  # as a default: modules are gone when the interpreter ends


class _Slot:
    __slots__ = ("lock", "spill")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.spill: Spill | None = None


class SpillCache:
    """The last few unpacked items; each is unpacked by one thread while others wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: OrderedDict[object, _Slot] = OrderedDict()

    def get(self, key: object, make: Callable[[], Spill]) -> Spill:
        """Return the piece of a key, made if it is not there."""
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            self._slots.move_to_end(key)
            while len(self._slots) > _MAX_SPILLS:
                self._slots.popitem(last=False)
        with slot.lock:
            if slot.spill is None:
                slot.spill = make()
            return slot.spill


SPILLS = SpillCache()
