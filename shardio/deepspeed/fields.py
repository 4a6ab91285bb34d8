"""Typed access to what the unpickler gave: every value of a rank file is untrusted.

Each accessor names the file and the key when something else than expected is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ...errors import FormatError, UnsupportedError
from ..records import Record, StoredTensor, exotic_kind
from ..stored import plain

Shape = tuple[int, ...]
_MAX_ELEMENTS = 1 << 50


class Fields:
    """A dictionary from a file.

    Attributes:
        path: the file, for messages.
        where: keys that lead to this dictionary.
        data: the dictionary.
    """

    __slots__ = ("data", "path", "where")

    def __init__(self, path: Path, data: object, where: str = "") -> None:
        self.path = path
        self.where = where
        if not isinstance(data, dict):
            raise self.wrong(where or "the file", "a dictionary", data)
        self.data: dict[Any, Any] = data

    def wrong(self, key: str, expected: str, found: object) -> FormatError:
        """Return the error for a value that is not what it should be."""
        kind = found.name if type(found) is Record else type(found).__name__
        return FormatError(f"{self.path}: {key}: expected {expected}, found {kind[:80]}")

    def at(self, key: str) -> str:
        """The path of a key for messages."""
        return f"{self.where}.{key}" if self.where else key

    def sub(self, key: str) -> Fields:
        """A dictionary within."""
        return Fields(self.path, self.need(key), self.at(key))

    def need(self, key: str) -> Any:
        """A value that must be there."""
        if key not in self.data:
            raise FormatError(
                f"{self.path}: no {self.at(key)!r}: not a DeepSpeed rank file, or not a whole one"
            )
        return self.data[key]

    def get(self, key: str) -> Any:
        """A value, or None."""
        return self.data.get(key)

    def integer(self, key: str) -> int | None:
        """A count, or None when absent."""
        value = plain(self.get(key))
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < 2**53:
            raise self.wrong(self.at(key), "a count", self.get(key))
        return value

    def items(self, key: str) -> list[Any]:
        """A list (or tuple)."""
        value = self.need(key)
        if not isinstance(value, (list, tuple)):
            raise self.wrong(self.at(key), "a list", value)
        return list(value)

    def mapping(self, key: str) -> dict[Any, Any] | None:
        """A dictionary, or None when absent or None."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(self.at(key), "a dictionary", value)
        return value

    def text(self, key: str) -> str | None:
        """A short text, or None."""
        value = self.get(key)
        return value[:200] if isinstance(value, str) else None

    def plain(self, key: str) -> Any:
        """A value as plain data."""
        return plain(self.get(key))

    def tensors(self, data: Mapping[Any, Any], where: str) -> dict[str, StoredTensor]:
        """The tensors of a state dict; what is no tensor (extra states) is left out.

        Raises:
            UnsupportedError: sparse, quantized and other tensors without plain bytes.
        """
        found: dict[str, StoredTensor] = {}
        for name, value in data.items():
            if kind := exotic_kind(value):
                raise UnsupportedError(f"{self.path}: {where} {name!r} is {kind}")
            if type(value) is StoredTensor and isinstance(name, str):
                found[name] = value
        return found

    def flat(self, value: object, where: str) -> StoredTensor:
        """A one-dimensional tensor without gaps."""
        if type(value) is not StoredTensor:
            raise self.wrong(where, "a tensor", value)
        if len(value.shape) != 1 or not value.contiguous:
            raise FormatError(
                f"{self.path}: {where}: expected a flat vector, found shape {value.shape}"
            )
        return value

    def shapes(self, value: object, where: str) -> dict[str, Shape]:
        """A table of parameter shapes."""
        if not isinstance(value, dict):
            raise self.wrong(where, "a table of shapes", value)
        table: dict[str, Shape] = {}
        for name, shape in value.items():
            ok = isinstance(name, str) and isinstance(shape, (tuple, list))
            if not ok or any(type(n) is not int or not 0 <= n < 2**48 for n in shape):
                raise self.wrong(f"{where} {str(name)[:80]!r}", "a shape", shape)
            if prod(shape) > _MAX_ELEMENTS:
                raise FormatError(f"{self.path}: {where} {name!r}: absurd shape {tuple(shape)}")
            table[name] = tuple(shape)
        return table
