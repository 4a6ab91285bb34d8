"""Metadata that a user sets: ``KEY=VALUE`` with the type of the key, an explicit one, or a guess.

``VALUE`` may begin with a type (``u32:``, ``str:``, ``f32[]:``), and be ``@FILE`` for the text of a
file, such as a chat template. Keys keep their place; new ones come last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, FormatError
from .scan import StringArray
from .values import KeyValue, ValueType
from .writer import pack_entry

_NAMES: Mapping[str, ValueType] = {
    **{kind.name.lower(): kind for kind in ValueType if kind != ValueType.ARRAY},
    "str": ValueType.STRING,
}
#: What is meant as a type although it is none: ``u33:5``, ``int:5``, ``strings[]:a,b``.
_LIKE_A_TYPE = re.compile(
    r"(?:(?:u|i|s|f|bf|fp|u?int|float)\d{1,3}|u?int|float|double|text|arr(?:ay)?)(?:\[\])?"
    r"|\w+\[\]",
    re.IGNORECASE,
)
_FLOATS = (ValueType.F32, ValueType.F64)


def apply_settings(entries: Iterable[KeyValue], texts: Sequence[str]) -> list[KeyValue]:
    """Return the entries with the settings ``KEY=VALUE`` made.

    Raises:
        ConfigError: a setting that cannot be read, or does not fit its type.
    """
    out = {entry.key: entry for entry in entries}
    for text in texts:
        entry = parse_setting(text, out)
        out[entry.key] = entry
    return list(out.values())


def parse_setting(text: str, known: Mapping[str, KeyValue]) -> KeyValue:
    """Return the entry of ``KEY=VALUE``.

    Args:
        text: the setting; see the module.
        known: entries that are there, whose types new values take.

    Raises:
        ConfigError: another form, an unknown type, or a value that is not of its type.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"{text!r} is not of the form KEY=VALUE, such as general.name=Mine")
    name, colon, rest = value.partition(":")
    items = name.endswith("[]")
    kind = _NAMES.get(name.removesuffix("[]")) if colon else None
    if colon and kind is None and _LIKE_A_TYPE.fullmatch(name):
        raise ConfigError(
            f"{text!r}: there is no type {name!r}; types are {', '.join(_NAMES)}, and each with "
            f"[] for a list (a text that begins like this is given as {key}=str:{value})"
        )
    if kind is not None:
        entry = _array(key, kind, rest) if items else _scalar(key, kind, _loaded(rest))
    elif key in known:
        old = known[key]
        entry = (
            _array(key, old.items, value)
            if old.items is not None
            else _scalar(key, old.type, _loaded(value))
        )
    else:
        entry = _guessed(key, _loaded(value))
    try:
        pack_entry(entry)
    except (FormatError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{text!r}: {error}") from error
    return entry


def shown(entry: KeyValue, limit: int = 60) -> str:
    """Return a value for people: texts cut to ``limit`` characters, arrays to their beginning."""
    value = entry.value
    if entry.items is not None:
        some = ", ".join(_text(v, 20) for v in list(value[:4]))
        more = ", ..." if len(value) > 4 else ""
        return f"[{some}{more}] ({len(value)} of {entry.items.name.lower()})"
    return _text(value, limit)


def plain(entry: KeyValue) -> Any:
    """Return a value as plain data for JSON."""
    value = entry.value
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, StringArray | list | tuple) else value


def _text(value: Any, limit: int) -> str:
    if not isinstance(value, str):
        return str(value)
    line = value.replace("\n", "\\n")
    return line if len(line) <= limit else f"{line[:limit]}..."


def _loaded(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text[1:]}: cannot be read as UTF-8 text: {error}") from error


def _scalar(key: str, kind: ValueType, text: str) -> KeyValue:
    if kind == ValueType.STRING:
        return KeyValue(key, kind, text)
    if kind == ValueType.BOOL:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{key}={text!r}: a bool is true or false")
        return KeyValue(key, kind, text.lower() == "true")
    try:
        return KeyValue(key, kind, float(text) if kind in _FLOATS else int(text))
    except ValueError:
        raise ConfigError(f"{key}={text!r}: the value is no {kind.name.lower()}") from None


def _array(key: str, kind: ValueType, text: str) -> KeyValue:
    """Read a JSON list, or values with commas."""
    try:
        values = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
    except ValueError as error:
        raise ConfigError(f"{key}={text!r}: is not a JSON list ({error})") from error
    parts = [_scalar(key, kind, v if isinstance(v, str) else json.dumps(v)).value for v in values]
    if kind == ValueType.STRING:
        return KeyValue(key, ValueType.ARRAY, parts, kind)
    return KeyValue(key, ValueType.ARRAY, np.array(parts), kind)


def _guessed(key: str, text: str) -> KeyValue:
    """Return an entry of the type that a value looks like; whole numbers are u32 where they fit."""
    try:
        value = json.loads(text)
    except ValueError:
        return KeyValue(key, ValueType.STRING, text)
    if isinstance(value, bool):
        return KeyValue(key, ValueType.BOOL, value)
    if isinstance(value, int):
        kinds = (ValueType.U32, ValueType.I32, ValueType.U64, ValueType.I64)
        fits = next((k for k in kinds if _fits(value, k)), ValueType.U64)
        return KeyValue(key, fits, value)
    if isinstance(value, float):
        return KeyValue(key, ValueType.F32, value)
    if isinstance(value, list) and value:
        if all(type(v) is int for v in value):
            return _array(key, ValueType.I32, text)
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
            return _array(key, ValueType.F32, text)
        if all(isinstance(v, str) for v in value):
            return _array(key, ValueType.STRING, text)
    return KeyValue(key, ValueType.STRING, value if isinstance(value, str) else text)


def _fits(value: int, kind: ValueType) -> bool:
    bits = 64 if kind.name.endswith("64") else 32
    low, high = (
        (0, 2**bits - 1) if kind.name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
    return low <= value <= high
