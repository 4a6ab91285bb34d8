"""The text arguments of pickle opcodes: protocol 0, and the byte strings of Python 2.

Numbers are limited in length, because parsing decimal digits takes quadratic time. Escapes are
decoded here rather than by ``codecs``, which warns about unknown ones. Format: CPython's
``pickletools``.
"""

from __future__ import annotations

import re

from .pickle_machine import Machine

MAX_INT_BYTES = 1_024
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def text_int(m: Machine) -> object:
    """Return the integer of INT or LONG; protocol 0 writes booleans as 00 and 01."""
    text = m.line()
    if text in (b"00", b"01"):
        return text == b"01"
    if len(text) > MAX_INT_BYTES:
        m.guard.fail("an integer is absurdly long")
    return int(text.rstrip(b"L"))


def decode_py2(raw: bytes) -> str:
    """Decode a Python 2 byte string: UTF-8 as torch does, latin-1 where that fails."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def text_float(m: Machine) -> object:
    """Return the number of FLOAT."""
    text = m.line()
    if len(text) > MAX_INT_BYTES:
        m.guard.fail("a number is absurdly long")
    return float(text)


def _unescape(match: re.Match[bytes]) -> bytes:
    escape = match[1]
    if escape[:1] == b"x":
        return bytes.fromhex(escape[1:].decode("ascii"))
    return _ESCAPES.get(escape, escape)


def text_string(m: Machine) -> object:
    """Return the text of STRING, a quoted Python 2 literal."""
    text = m.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        m.guard.fail("a string has no quotes")
    return decode_py2(_ESCAPE.sub(_unescape, text[1:-1]))
