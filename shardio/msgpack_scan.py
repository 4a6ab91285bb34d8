"""Reading MessagePack without its payloads: where the long byte strings of a file lie.

Maps, arrays, strings and numbers are parsed; byte strings and extensions give their place. Nesting
and counts are bounded by the bytes that are there. Source: the MessagePack specification.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

_MAX_DEPTH = 32
_MAX_TEXT = 1 << 16
_MAX_ITEMS = 1_000_000
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b",
            0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_SIZES = {1: ">B", 2: ">H", 4: ">I"}


@dataclass(frozen=True, slots=True)
class Place:
    """A byte string (``code`` None) or the payload of an extension."""

    offset: int
    size: int
    code: int | None = None


class Scanner:
    """Parses values of a file one after the other.

    Args:
        file: opened for reading bytes.
        end: where the values end.
        at: where they begin.
    """

    def __init__(self, file: BinaryIO, end: int, at: int = 0) -> None:
        self._file, self._end, self.at = file, end, at
        self._items = 0
        file.seek(at)

    def value(self, depth: int = 0) -> Any:
        """Return the next value; byte strings and extensions as ``Place``.

        Raises:
            ValueError: malformed or truncated data, or nesting that no checkpoint has.
        """
        self._items += 1
        if depth > _MAX_DEPTH or self._items > _MAX_ITEMS:
            raise ValueError("too many values, or nested too deeply")
        tag = self._take(1)[0]
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 256
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _NUMBERS:
            kind = _NUMBERS[tag]
            return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]
        if 0xA0 <= tag < 0xC0 or tag in (0xD9, 0xDA, 0xDB):
            return self._text(tag & 31 if tag < 0xC0 else self._size(1 << (tag - 0xD9)))
        if 0x80 <= tag < 0x90 or tag in (0xDE, 0xDF):
            return self._map(tag & 15 if tag < 0x90 else self._size(2 << (tag - 0xDE)), depth)
        if 0x90 <= tag < 0xA0 or tag in (0xDC, 0xDD):
            count = tag & 15 if tag < 0xA0 else self._size(2 << (tag - 0xDC))
            self._check(count)
            return [self.value(depth + 1) for _ in range(count)]
        if tag in (0xC4, 0xC5, 0xC6):
            return self._skip(self._size(1 << (tag - 0xC4)), None)
        if tag in (0xC7, 0xC8, 0xC9):
            size = self._size(1 << (tag - 0xC7))
            return self._skip(size, self._take(1)[0])
        if 0xD4 <= tag <= 0xD8:
            return self._skip(1 << (tag - 0xD4), self._take(1)[0])
        raise ValueError(f"byte {self.at - 1} is no value")

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        self._check(2 * count)
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str | int) or str(key) in found:
                raise ValueError(f"a map has the key {key!r}")
            found[str(key)] = self.value(depth + 1)
        return found

    def _text(self, size: int) -> str:
        if size > _MAX_TEXT:
            raise ValueError(f"a text of {size} bytes")
        return self._take(size).decode("utf-8")

    def _size(self, width: int) -> int:
        return int(struct.unpack(_SIZES[width], self._take(width))[0])

    def _check(self, count: int) -> None:
        if count > self._end - self.at:
            raise ValueError(f"{count} values do not fit the {self._end - self.at} bytes left")

    def _take(self, size: int) -> bytes:
        if self.at + size > self._end:
            raise ValueError("cut off")
        self.at += size
        data = self._file.read(size)
        if len(data) != size:
            raise ValueError("cut off")
        return data

    def _skip(self, size: int, code: int | None) -> Place:
        if self.at + size > self._end:
            raise ValueError(f"{size} bytes at {self.at} are cut off")
        found = Place(self.at, size, code)
        self.at += size
        self._file.seek(self.at)
        return found
