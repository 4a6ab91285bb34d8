"""GGUF metadata values: the thirteen types, and one constructor per type that converters use.

Format: ggml's GGUF v3. Every value carries its type; an array carries one item type for all its
items. ``KeyValue`` is what the writer packs and what the reader gives back, so metadata can be
copied from one file into another without losing a type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np


class ValueType(IntEnum):
    """The type codes of GGUF metadata (u32 in the file)."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


#: numpy type codes (without byte order) of the scalar value types.
SCALAR_CODES: Mapping[ValueType, str] = {
    ValueType.U8: "u1",
    ValueType.I8: "i1",
    ValueType.U16: "u2",
    ValueType.I16: "i2",
    ValueType.U32: "u4",
    ValueType.I32: "i4",
    ValueType.F32: "f4",
    ValueType.BOOL: "u1",
    ValueType.U64: "u8",
    ValueType.I64: "i8",
    ValueType.F64: "f8",
}


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One metadata entry.

    ``value`` is an int, float, bool or str; for arrays a numpy array (scalar items) or a sequence
    of ``str`` or UTF-8 ``bytes``, with the item type in ``items``.
    """

    key: str
    type: ValueType
    value: Any
    items: ValueType | None = None


def u32(key: str, value: int) -> KeyValue:
    """Return an unsigned 32-bit entry, the usual type of counts, lengths and token ids."""
    return KeyValue(key, ValueType.U32, int(value))


def f32(key: str, value: float) -> KeyValue:
    """Return a 32-bit float entry."""
    return KeyValue(key, ValueType.F32, float(value))


def boolean(key: str, value: bool) -> KeyValue:
    """Return a boolean entry."""
    return KeyValue(key, ValueType.BOOL, bool(value))


def string(key: str, value: str) -> KeyValue:
    """Return a UTF-8 string entry."""
    return KeyValue(key, ValueType.STRING, value)


def strings(key: str, value: Sequence[str] | Sequence[bytes]) -> KeyValue:
    """Return an array of strings."""
    return KeyValue(key, ValueType.ARRAY, value, ValueType.STRING)


def i32_array(key: str, value: Sequence[int] | np.ndarray) -> KeyValue:
    """Return an array of signed 32-bit integers."""
    return KeyValue(key, ValueType.ARRAY, np.asarray(value, np.int32), ValueType.I32)


def booleans(key: str, value: Sequence[bool]) -> KeyValue:
    """Return an array entry of BOOL."""
    return KeyValue(key, ValueType.ARRAY, list(value), ValueType.BOOL)


def f32_array(key: str, value: Sequence[float] | np.ndarray) -> KeyValue:
    """Return an array of 32-bit floats."""
    return KeyValue(key, ValueType.ARRAY, np.asarray(value, np.float32), ValueType.F32)
