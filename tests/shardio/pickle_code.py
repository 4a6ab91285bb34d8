"""Building blocks for hand-made pickles: what no honest writer produces."""

from __future__ import annotations

import struct


def glob(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def num(value: int) -> bytes:
    """LONG1."""
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tup(*parts: bytes) -> bytes:
    """MARK ... TUPLE."""
    return b"(" + b"".join(parts) + b"t"


def call(module: str, name: str, *args: bytes) -> bytes:
    """GLOBAL, arguments, REDUCE."""
    return glob(module, name) + tup(*args) + b"R"


def stop(body: bytes) -> bytes:
    """A whole protocol 4 pickle."""
    return b"\x80\x04" + body + b"."
