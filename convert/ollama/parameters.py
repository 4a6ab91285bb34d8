"""The PARAMETER names of a Modelfile and the types of their values.

Source: the options of Ollama's API (``temperature``, ``num_ctx``, ...). The server checks names and
types only when a Modelfile is read by the client, not when they come over HTTP or from the store: a
misspelt or mistyped parameter then breaks every chat. So they are checked here, always.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import ConfigError, did_you_mean

#: A typed parameter; ``stop`` alone may occur several times and is a tuple.
ParameterValue = int | float | bool | tuple[str, ...]

#: Every accepted name and its type.
PARAMETERS: Mapping[str, type] = {
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty",
         "frequency_penalty"), float,
    ),
    **dict.fromkeys(
        ("num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch",
         "num_gpu", "main_gpu", "num_thread", "draft_num_predict"), int,
    ),
    "use_mmap": bool,
    "stop": tuple,
}  # fmt: skip

#: Names of old releases: accepted with a warning, without effect.
DEPRECATED = frozenset(
    {
        "penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock",
        "mirostat", "mirostat_tau", "mirostat_eta",
    }
)  # fmt: skip

_FLOAT = re.compile(r"[+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)", re.I | re.A)
_INT = re.compile(r"[+-]?\d+", re.A)
_BOOLS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}
_INT64 = 1 << 63


def parse_parameter(name: str, text: str) -> ParameterValue:
    """Return the typed value of ``PARAMETER name text``.

    Args:
        name: as written; names are case-sensitive.
        text: the unquoted value; a ``stop`` gives a tuple of one text.

    Raises:
        ConfigError: the name is unknown, or the text is not of its type.
    """
    kind = PARAMETERS.get(name)
    if kind is None:
        raise ConfigError(f"unknown parameter {name!r}{did_you_mean(name, PARAMETERS)}")
    if kind is tuple:
        return (text,)
    if kind is bool:
        if text in _BOOLS:
            return _BOOLS[text]
    elif kind is int:
        if _INT.fullmatch(text) and -_INT64 <= int(text) < _INT64:
            return int(text)
    elif _FLOAT.fullmatch(text):
        return float(text)
    expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
    raise ConfigError(f"parameter {name}: {text!r} is not {expected}")


def check_parameters(values: Mapping[str, ParameterValue]) -> None:
    """Check names and types of parameters that do not come from text.

    Raises:
        ConfigError: a name is unknown or deprecated, or a value has the wrong type.
    """
    for name, value in values.items():
        if value == ():
            raise ConfigError(f"parameter {name}: there is no text")
        if isinstance(value, str):
            raise ConfigError(f"parameter {name}: {value!r} is text, expected a number")
        texts = value if isinstance(value, tuple) else (format_parameter(value),)
        for text in texts:
            if not isinstance(text, str):
                raise ConfigError(f"parameter {name}: {text!r} is not text")
            parse_parameter(name, text)


def format_parameter(value: int | float | bool) -> str:
    """Return a number or truth value as a Modelfile writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)
