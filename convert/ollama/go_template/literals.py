"""Go's number, string and character constants.

Source: the Go language specification, sections "Integer literals" to "String literals". A Go string
is bytes; ours is text in which bytes that are not UTF-8 are surrogate escapes.
"""

from __future__ import annotations

import re

_PLAIN = {
    "a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92, "'": 39, '"': 34,
}  # fmt: skip
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv\\'\"])|x([0-9a-fA-F]{2})|([0-7]{3})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))"
)


def number(text: str) -> int | float:
    """Return a number constant; 0x, 0b, 0o and a leading 0 give the base.

    Raises:
        ValueError: it is not a number.
    """
    plain = text.replace("_", "")
    digits = plain.lstrip("+-")
    if len(digits) > 1 and digits[0] == "0" and digits.isdigit():
        return int(plain, 8)
    try:
        return int(plain, 0)
    except ValueError:
        pass
    try:
        return float(plain)
    except ValueError:
        raise ValueError(f"bad number syntax: {text!r}") from None


def string(text: str) -> str | int:
    """Return what a quoted, raw or character constant means; a character is its code point.

    Raises:
        ValueError: an escape is wrong.
    """
    if text.startswith("`"):
        return text[1:-1].replace("\r", "")
    quote, inner = text[0], text[1:-1]
    out, at = bytearray(), 0
    while at < len(inner):
        if inner[at] != "\\":
            out += inner[at].encode("utf-8", "surrogateescape")
            at += 1
            continue
        match = _ESCAPE.match(inner, at)
        wrong = "'" if quote == '"' else '"'
        if match is None or match[1] == wrong:
            raise ValueError(f"invalid syntax in {text}")
        out += _escaped(match)
        at = match.end()
    value = out.decode("utf-8", "surrogateescape")
    if quote == '"':
        return value
    if len(value) != 1:
        raise ValueError(f"malformed character constant: {text}")
    return ord(value)


def _escaped(match: re.Match[str]) -> bytes:
    plain, byte, octal, short, long = match.groups()
    if plain is not None:
        return bytes([_PLAIN[plain]])
    if byte is not None or octal is not None:
        value = int(byte, 16) if byte is not None else int(octal, 8)
        if value > 255:
            raise ValueError(f"invalid syntax in escape {match[0]}")
        return bytes([value])
    code = int(short or long, 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise ValueError(f"invalid syntax in escape {match[0]}")
    return chr(code).encode()
