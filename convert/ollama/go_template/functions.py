"""The functions of Go templates, and those that Ollama adds.

Source: the documentation of Go's ``text/template`` (``and or not len index slice print printf
println eq ne lt le gt ge html urlquery``; ``call`` and ``js`` have no use in prompts) and Ollama's
``json currentDate yesterdayDate``. Strings are counted and cut in bytes, as in Go.
"""

from __future__ import annotations

import datetime
import html as python_html
import re
import urllib.parse
from collections.abc import Callable, Mapping

from .values import (
    MISSING,
    GoTemplateError,
    JsonList,
    JsonMap,
    Struct,
    Value,
    kind,
    show,
    to_json,
    truth,
)

#: ``and`` and ``or`` are here to be known; the executor runs them, as they skip arguments.
SHORT_CIRCUIT = ("and", "or")


def _fail(why: str) -> GoTemplateError:
    return GoTemplateError(why)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _not(value: Value) -> bool:
    return not truth(value)


def _len(value: Value) -> int:
    if isinstance(value, str):
        return len(_bytes(value))
    if isinstance(value, (list, Mapping)) and not isinstance(value, Struct):
        return len(value)
    raise _fail(f"len of {'nil' if value in (None, MISSING) else kind(value)}")


def _position(index: Value, length: int) -> int:
    if isinstance(index, bool) or not isinstance(index, int):
        raise _fail(f"cannot index slice/array with {kind(index)}")
    if not 0 <= index < length:
        raise _fail(f"index out of range: {index}")
    return index


def _index(item: Value, *indexes: Value) -> Value:
    for index in indexes:
        if item is None or item is MISSING:
            raise _fail("index of untyped nil")
        if isinstance(item, str):
            data = _bytes(item)
            item = data[_position(index, len(data))]
        elif isinstance(item, list):
            item = item[_position(index, len(item))]
        elif isinstance(item, Mapping) and not isinstance(item, Struct):
            if not isinstance(index, str):
                raise _fail("value has wrong type as a map key; should be string")
            item = item.get(index, None)
        else:
            raise _fail(f"can't index item of type {kind(item)}")
    return item


def _slice(item: Value, *indexes: Value) -> Value:
    if len(indexes) > 3:
        raise _fail(f"too many slice indexes: {len(indexes)}")
    if isinstance(item, str):
        if len(indexes) == 3:
            raise _fail("cannot 3-index slice a string")
        data: bytes | list = _bytes(item)
    elif isinstance(item, list):
        data = item
    else:
        raise _fail(f"can't slice item of type {kind(item)}")
    marks = [0, len(data), len(data)]
    for k, index in enumerate(indexes):
        marks[k] = _position(index, len(data) + 1)
    if marks[0] > marks[1] or marks[1] > marks[2]:
        raise _fail(f"invalid slice index: {marks[0]} > {marks[1]}")
    cut = data[marks[0] : marks[1]]
    return _text(cut) if isinstance(cut, bytes) else cut


def _comparable(a: Value, b: Value) -> bool:
    """Return whether two values may be compared; nil with anything. Raises for unlike kinds."""
    kinds = kind(a), kind(b)
    if kinds[0] != kinds[1]:
        if _nil(a) or _nil(b):
            return False
        raise _fail("incompatible types for comparison")
    if kinds[0] == "other" and not (_nil(a) or _nil(b)):
        raise _fail("non-comparable types")
    return True


def _nil(value: Value) -> bool:
    return value is None or value is MISSING


def _eq(first: Value, *others: Value) -> bool:
    if not others:
        raise _fail("missing argument for comparison")
    for other in others:
        if _comparable(first, other):
            same = _nil(first) == _nil(other) if kind(first) == "other" else first == other
            if same:
                return True
    return False


def _ne(a: Value, b: Value) -> bool:
    return not _eq(a, b)


def _lt(a: Value, b: Value) -> bool:
    if kind(a) != kind(b):
        raise _fail("incompatible types for comparison")
    if kind(a) in ("bool", "other"):
        raise _fail("invalid type for comparison")
    if isinstance(a, str):
        return _bytes(a) < _bytes(b)
    return bool(a < b)


def _le(a: Value, b: Value) -> bool:
    return _lt(a, b) or _eq(a, b)


def _gt(a: Value, b: Value) -> bool:
    return not _le(a, b)


def _ge(a: Value, b: Value) -> bool:
    return not _lt(a, b)


def _print(*args: Value) -> str:
    """Blanks go between two arguments of which neither is a string."""
    out = ""
    for k, value in enumerate(args):
        if k and not isinstance(value, str) and not isinstance(args[k - 1], str):
            out += " "
        out += show(value, False)
    return out


def _println(*args: Value) -> str:
    return " ".join(show(value, False) for value in args) + "\n"


_VERB = re.compile(r"%([-+ #0]*)(\d*)(?:\.(\d*))?([a-zA-Z%])")


def _printf(form: Value, *args: Value) -> str:
    if not isinstance(form, str):
        raise _fail(f"wrong type for value; expected string; got {kind(form)}")
    left = list(args)

    def put(match: re.Match[str]) -> str:
        flags, width, precision, verb = match.groups()
        if verb == "%":
            return "%"
        if not left:
            return f"%!{verb}(MISSING)"
        text = _verb(verb, left.pop(0), flags, precision)
        fill = "0" if "0" in flags and "-" not in flags else " "
        size = int(width or 0)
        if "-" in flags:
            return text.ljust(size)
        if fill == "0" and text[:1] in "+-" and text:
            return text[0] + text[1:].rjust(size - 1, "0")
        return text.rjust(size, fill)

    out = _VERB.sub(put, form)
    if left:
        extra = ", ".join(f"{_type(v)}={show(v, False)}" for v in left)
        out += f"%!(EXTRA {extra})"
    return out


def _type(value: Value) -> str:
    return {"float": "float64", "other": "value"}.get(kind(value), kind(value))


def _verb(verb: str, value: Value, flags: str, precision: str | None) -> str:
    if value is None or value is MISSING:
        return "<nil>" if verb == "v" else f"%!{verb}(<nil>)"
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if verb == "v":
        return show(value, False)
    if verb == "s":
        text = _strings(value)
        cut = precision is not None and isinstance(value, str)
        return text[: int(precision or 0)] if cut else text
    if verb == "d" and is_int:
        return f"{value:+d}" if "+" in flags else str(value)
    if verb == "t" and isinstance(value, bool):
        return show(value)
    if verb in "xX" and is_int:
        return format(value, verb)
    if verb in "feg" and isinstance(value, float):
        if verb == "g" and precision is None:
            return show(value)
        return format(value, f"{'+' if '+' in flags else ''}.{precision or 6}{verb}")
    if verb == "q" and isinstance(value, str):
        return _quote(value)
    if verb in "dtxXfegq":
        return f"%!{verb}({_type(value)}={show(value, False)})"
    raise _fail(f"printf verb %{verb} is not known here")


def _strings(value: Value) -> str:
    """Return a value as %s prints it: parts that are no strings are marked."""
    if isinstance(value, (JsonList, JsonMap, str)):
        return show(value)
    if isinstance(value, Struct):
        raise _fail("printf %s of a struct is not known here; use %v")
    if isinstance(value, list):
        return f"[{' '.join(map(_strings, value))}]"
    if isinstance(value, Mapping):
        return f"map[{' '.join(f'{k}:{_strings(value[k])}' for k in sorted(value))}]"
    if _nil(value):
        return "%!s(<nil>)"
    return f"%!s({_type(value)}={show(value)})"


def _quote(text: str) -> str:
    short = {"\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t",
             "\v": "\\v", '"': '\\"', "\\": "\\\\"}  # fmt: skip

    def one(c: str) -> str:
        if c in short or c.isprintable():
            return short.get(c, c)
        code = ord(c)
        if 0xDC80 <= code <= 0xDCFF:
            return f"\\x{code - 0xDC00:02x}"
        if code < 0x80:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return f'"{"".join(map(one, text))}"'


def _html(*args: Value) -> str:
    text = python_html.escape(_print(*args), quote=False)
    return text.replace('"', "&#34;").replace("'", "&#39;").replace("\0", "\ufffd")


def _urlquery(*args: Value) -> str:
    return urllib.parse.quote_plus(_bytes(_print(*args)), safe="")


def _json(value: Value) -> str:
    return to_json(value)


def builtins(today: datetime.date) -> dict[str, Callable[..., Value]]:
    """Return every function by name.

    Args:
        today: what ``currentDate`` says.
    """
    yesterday = today - datetime.timedelta(days=1)
    return {
        "not": _not, "len": _len, "index": _index, "slice": _slice,
        "print": _print, "println": _println, "printf": _printf,
        "eq": _eq, "ne": _ne, "lt": _lt, "le": _le, "gt": _gt, "ge": _ge,
        "html": _html, "urlquery": _urlquery,
        "json": _json,
        "currentDate": lambda: today.isoformat(),
        "yesterdayDate": lambda: yesterday.isoformat(),
    }  # fmt: skip


#: Every known name, for the parser.
NAMES = frozenset({*SHORT_CIRCUIT, *builtins(datetime.date(2000, 1, 1))})
