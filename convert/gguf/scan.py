"""Parse a GGUF header from a mapped file: one pass, no Python object per array element.

Format: ggml's GGUF v2 and v3. The file is untrusted: every count is checked against the bytes
that are left before anything is allocated or looped over, so a hostile header ends in a
``FormatError``, not in a ``MemoryError`` or a long wait.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from ...errors import FormatError
from .values import SCALAR_CODES, KeyValue, ValueType

Buffer = bytes | memoryview

#: Smallest possible entries: key length + 1-byte key + type + 1-byte value; name length + 1-byte
#: name + dimension count + one dimension + type + offset.
MIN_ENTRY_BYTES = 14
MIN_INFO_BYTES = 33
MAX_KEY_BYTES = 65535


class StringArray(Sequence[str]):
    """The strings of a GGUF array, decoded when they are asked for.

    Bytes that are not UTF-8 become lone surrogates, so nothing is lost when they are written back.
    """

    __slots__ = ("_buffer", "_lengths", "_starts")

    def __init__(self, buffer: Buffer, starts: np.ndarray, lengths: np.ndarray) -> None:
        self._buffer = buffer
        self._starts = starts
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.raw(index).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        buffer = self._buffer
        for start, length in zip(self._starts.tolist(), self._lengths.tolist(), strict=True):
            yield bytes(buffer[start : start + length]).decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # compares by content, like a list

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings)"

    def raw(self, index: int) -> bytes:
        """Return the bytes of one string."""
        start = int(self._starts[index])
        return bytes(self._buffer[start : start + int(self._lengths[index])])


class Cursor:
    """A position in a mapped header. ``order`` is ``<`` or ``>``."""

    __slots__ = ("buffer", "order", "path", "position", "size")

    def __init__(self, buffer: Buffer, path: Path, order: str = "<") -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.path = path
        self.order = order
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes between the position and the end of the file."""
        return self.size - self.position

    def fail(self, problem: str) -> FormatError:
        """Return the error for a problem at this position."""
        return FormatError(f"{self.path}: {problem} (at byte {self.position}); the file is damaged")

    def unpack(self, code: str) -> int:
        """Read one integer of struct type ``code``."""
        width = struct.calcsize(f"<{code}")
        if self.left < width:
            raise self.fail("the file ends inside its header")
        (value,) = struct.unpack_from(f"{self.order}{code}", self.buffer, self.position)
        self.position += width
        return int(value)

    def text(self, what: str, limit: int | None = None) -> str:
        """Read a length-prefixed UTF-8 string."""
        length = self.unpack("Q")
        if length > self.left or (limit is not None and length > limit):
            raise self.fail(f"{what} claims {length} bytes, {self.left} are left in the file")
        raw = bytes(self.buffer[self.position : self.position + length])
        try:
            value = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 text") from error
        self.position += length
        return value

    def value_type(self, key: str) -> ValueType:
        """Read a value type code."""
        code = self.unpack("I")
        try:
            return ValueType(code)
        except ValueError:
            raise self.fail(f"key {key!r} has the unknown value type {code}") from None

    def entry(self) -> KeyValue:
        """Read one metadata entry."""
        key = self.text("a metadata key", MAX_KEY_BYTES)
        kind = self.value_type(key)
        if kind == ValueType.STRING:
            return KeyValue(key, kind, self.text(f"the value of {key!r}"))
        if kind != ValueType.ARRAY:
            scalar = self._scalars(key, kind, 1)[0]
            return KeyValue(key, kind, bool(scalar) if kind == ValueType.BOOL else scalar.item())
        items = self.value_type(key)
        count = self.unpack("Q")
        if items == ValueType.ARRAY:
            raise self.fail(f"key {key!r} is an array of arrays, which GGUF readers refuse")
        if items == ValueType.STRING:
            return KeyValue(key, kind, self._strings(key, count), items)
        values = self._scalars(key, items, count)
        return KeyValue(key, kind, values.view(bool) if items == ValueType.BOOL else values, items)

    def _scalars(self, key: str, kind: ValueType, count: int) -> np.ndarray:
        dtype = np.dtype(self.order + SCALAR_CODES[kind])
        if count > self.left // dtype.itemsize:
            raise self.fail(f"key {key!r} claims {count} values, more than the file holds")
        values = np.frombuffer(self.buffer, dtype, count, self.position)
        self.position += values.nbytes
        if kind == ValueType.BOOL and count and values.max() > 1:
            raise self.fail(f"key {key!r} holds a boolean that is neither 0 nor 1")
        return values

    def _strings(self, key: str, count: int) -> StringArray:
        if count > self.left // 8:
            raise self.fail(f"key {key!r} claims {count} strings, more than the file holds")
        starts = self._short_strings(count)
        if starts is None:
            starts = self._long_strings(key, count)
        begins = starts[:-1] + 8
        self.position = int(starts[-1])
        return StringArray(self.buffer, begins, starts[1:] - begins)

    def _short_strings(self, count: int) -> np.ndarray | None:
        """Return where each string's length field starts, plus the end, if all lengths are < 256.

        Nearly every token and merge is short, so the walk reads one byte per string; the seven
        other bytes of all lengths are then checked to be zero at once. ``None``: not so.
        """
        buffer, position = self.buffer, self.position
        low = 0 if self.order == "<" else 7
        starts = array("q", [position])
        push = starts.append
        try:
            for _ in range(count):
                position += 8 + buffer[position + low]
                push(position)
        except IndexError:
            return None
        if position > self.size:
            return None
        found = np.frombuffer(starts, np.int64)
        view = np.frombuffer(self.buffer, np.uint8)
        for byte in range(8):
            if byte != low and view[found[:-1] + byte].any():
                return None
        return found

    def _long_strings(self, key: str, count: int) -> np.ndarray:
        position, size = self.position, self.size
        unpack = struct.Struct(f"{self.order}Q").unpack_from
        starts = array("q", [position])
        for index in range(count):
            length = unpack(self.buffer, position)[0] if position + 8 <= size else size
            if length > size - position - 8:
                raise self.fail(f"string {index} of key {key!r} reaches past the end of the file")
            position += 8 + length
            starts.append(position)
        return np.frombuffer(starts, np.int64)
