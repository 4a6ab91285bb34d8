"""Just enough of the protobuf wire format to read small messages, without generated code.

Source: protobuf.dev, "Encoding". Unknown fields are kept by number; groups are refused.
"""

from __future__ import annotations

from collections.abc import Mapping

Fields = Mapping[int, list[int | bytes]]


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return (value, next position). Raises ValueError when the data ends or it is too long."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number is cut off or too long")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), at
        shift += 7


def signed(value: int) -> int:
    """Return an int64 from its unsigned form."""
    return value - 2**64 if value >= 2**63 else value


def fields(data: bytes) -> Fields:
    """Return {field number: values}, bytes for length-delimited ones, else unsigned numbers.

    Raises:
        ValueError: malformed data.
    """
    found: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == 0:
            value, at = varint(data, at)
        elif wire in (1, 5):
            width = 8 if wire == 1 else 4
            if at + width > len(data):
                raise ValueError("a fixed number is cut off")
            value, at = int.from_bytes(data[at : at + width], "little"), at + width
        elif wire == 2:
            length, at = varint(data, at)
            if at + length > len(data):
                raise ValueError("a field is cut off")
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"wire type {wire}")
        found.setdefault(number, []).append(value)
    return found


def first(found: Fields, number: int, default: int) -> int:
    """Return the last number of a field (protobuf's rule), or the default."""
    values = [v for v in found.get(number, []) if isinstance(v, int)]
    return values[-1] if values else default


def text(found: Fields, number: int) -> str:
    """Return the last text of a field, or an empty one."""
    values = [v for v in found.get(number, []) if isinstance(v, bytes)]
    return values[-1].decode("utf-8", "replace") if values else ""
