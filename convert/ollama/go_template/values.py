"""Values of a Go template: truth, printing, JSON and comparison as Go does them.

Source: Go's packages ``text/template``, ``fmt`` (verb %v) and ``encoding/json``. Python's dict,
    list,
str, int, float, bool and None stand for map, slice, string, int, float64, bool and nil; a
``Struct`` has a fixed set of fields, and reading another one is an error, as in Go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from ....errors import FormatError

Value = Any


class Struct(dict[str, Value]):
    """A Go struct: fields in order, always true, unknown fields are an error.

    ``json_names`` gives the names of fields in JSON; those in ``json_optional`` are left out when
    empty.
    """

    json_names: ClassVar[Mapping[str, str]] = {}
    json_optional: ClassVar[frozenset[str]] = frozenset()


class JsonList(list[Value]):
    """A list that prints itself as JSON, like Ollama's tools."""


class JsonMap(dict[str, Value]):
    """A map that prints itself as JSON, like the arguments of Ollama's tool calls."""


class _Missing:
    """The value of a map key that does not exist."""


MISSING = _Missing()


class GoTemplateError(FormatError):
    """A template that does not parse, or fails when it runs."""


def truth(value: Value) -> bool:
    """Return whether ``if`` takes the branch: not false, 0, nil or empty."""
    if isinstance(value, Struct):
        return True
    return bool(value) and value is not MISSING


def kind(value: Value) -> str:
    """Return the kind that comparisons go by."""
    if isinstance(value, bool):
        return "bool"
    for python, name in ((int, "int"), (float, "float"), (str, "string")):
        if isinstance(value, python):
            return name
    return "other"


def show(value: Value, top: bool = True) -> str:
    """Return what printing a value gives (``fmt``'s %v).

    Args:
        value: anything.
        top: whether it is printed itself, not as part of another value.
    """
    if value is None or value is MISSING:
        return "<no value>" if top else "<nil>"
    if isinstance(value, (JsonList, JsonMap)):
        return to_json(value)
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return show_float(value)
    if isinstance(value, Struct):
        return "{" + " ".join(show(item, False) for item in value.values()) + "}"
    if isinstance(value, Mapping):
        pairs = (f"{key}:{show(value[key], False)}" for key in sorted(value))
        return f"map[{' '.join(pairs)}]"
    if isinstance(value, list):
        return f"[{' '.join(show(item, False) for item in value)}]"
    return str(value)


_EXPONENT = 6


def show_float(value: float) -> str:
    """Return a float in the shortest form; exponents from 1e+06 and below 1e-4 (Go's %v)."""
    if math.isnan(value) or math.isinf(value):
        return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}[str(value)]
    digits, power = _decimal(value)
    sign = "-" if math.copysign(1, value) < 0 else ""
    if value == 0 or -4 <= power < _EXPONENT:
        return sign + _plain(digits, power)
    tail = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{tail}e{'-' if power < 0 else '+'}{abs(power):02d}"


def _decimal(value: float) -> tuple[str, int]:
    """Return the shortest digits of a float and the power of ten of the first one."""
    text, _, exponent = repr(abs(value)).partition("e")
    whole, _, part = text.partition(".")
    digits = whole + part
    leading = len(digits) - len(digits.lstrip("0"))
    power = int(exponent or 0) + len(whole) - 1 - leading
    return digits.strip("0") or "0", power if value else 0


def _plain(digits: str, power: int) -> str:
    if power < 0:
        return f"0.{'0' * (-power - 1)}{digits}"
    digits = digits.ljust(power + 1, "0")
    tail = f".{digits[power + 1 :]}" if len(digits) > power + 1 else ""
    return digits[: power + 1] + tail


_HTML = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def to_json(value: Value) -> str:
    """Return compact JSON as Go's ``encoding/json``: sorted keys, ``<>&`` escaped."""
    if value is None or value is MISSING:
        return "null"
    if isinstance(value, Struct):
        names = value.json_names
        items = {
            names.get(key, key): item
            for key, item in value.items()
            if item or key not in value.json_optional
        }
        return "{" + ",".join(f"{to_json(k)}:{to_json(v)}" for k, v in items.items()) + "}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{to_json(k)}:{to_json(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(to_json, value)) + "]"
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return json.dumps(text, ensure_ascii=False).translate(_HTML)
    if isinstance(value, float):
        return _json_float(value)
    return json.dumps(value)


def _json_float(value: float) -> str:
    if math.isnan(value) or math.isinf(value):
        raise GoTemplateError(f"json: unsupported value: {show_float(value)}")
    digits, power = _decimal(value)
    if value == 0 or -6 <= power < 21:
        return ("-" if math.copysign(1, value) < 0 else "") + _plain(digits, power)
    text = show_float(value)
    return text.replace("e-0", "e-")
