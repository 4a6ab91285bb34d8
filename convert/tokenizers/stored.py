"""The vocabulary of a GGUF file, read back into the form it was written from.

Format: the ``tokenizer.*`` keys as ``vocabulary.vocabulary_entries`` writes them. The order of ids
and flags is kept, since it is part of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import FormatError
from ..gguf.scan import StringArray
from ..gguf.values import KeyValue
from .chat_template import ChatTemplate
from .vocabulary import ADD_KEYS, ID_KEYS, Specials, TokenType, Vocabulary

_TEMPLATE = "tokenizer.chat_template"


def stored_vocabulary(entries: Mapping[str, KeyValue], path: object) -> Vocabulary:
    """Return the vocabulary that metadata entries hold.

    Args:
        entries: of a GGUF file, by key.
        path: of the file, for messages.

    Raises:
        FormatError: there is none, or it contradicts itself.
    """
    tokens = _texts(entries, "tokens")
    if not tokens:
        raise FormatError(f"{path}: holds no vocabulary (tokenizer.ggml.tokens)")
    types = _numbers(entries, "token_type")
    kinds = [int(TokenType.NORMAL)] * len(tokens) if types is None else types.astype(int).tolist()
    scores = _numbers(entries, "scores")
    for what, count in (
        ("types", len(kinds)),
        ("scores", len(tokens) if scores is None else len(scores)),
    ):
        if count != len(tokens):
            raise FormatError(f"{path}: {len(tokens)} tokens and {count} {what}; it is damaged")
    order = list(entries)
    ids = {role: key for role, key in ID_KEYS.items() if key in entries}
    flags = {role: key for role, key in ADD_KEYS.items() if key in entries}
    for key in ids.values():
        value = entries[key].value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(tokens):
            raise FormatError(f"{path}: {key} is {value!r}, there are {len(tokens)} tokens")
    return Vocabulary(
        model=str(_scalar(entries, "model", "")),
        pre=str(_scalar(entries, "pre", "default")),
        tokens=tokens,
        types=kinds,
        scores=None if scores is None else scores.astype(np.float32),
        merges=_texts(entries, "merges"),
        specials=Specials(
            {r: entries[ids[r]].value for r in sorted(ids, key=lambda r: order.index(ids[r]))},
            {
                r: bool(entries[flags[r]].value)
                for r in sorted(flags, key=lambda r: order.index(flags[r]))
            },
        ),
        chat_template=_template(entries),
        add_space_prefix=_scalar(entries, "add_space_prefix", None),
    )


def _scalar(entries: Mapping[str, KeyValue], name: str, default: Any) -> Any:
    entry = entries.get(f"tokenizer.ggml.{name}")
    return default if entry is None else entry.value


def _texts(entries: Mapping[str, KeyValue], name: str) -> list[str]:
    entry = entries.get(f"tokenizer.ggml.{name}")
    if entry is None or not isinstance(entry.value, StringArray | list | tuple):
        return []
    return [str(text) for text in entry.value]


def _numbers(entries: Mapping[str, KeyValue], name: str) -> np.ndarray | None:
    entry = entries.get(f"tokenizer.ggml.{name}")
    return None if entry is None else np.asarray(entry.value)


def _template(entries: Mapping[str, KeyValue]) -> ChatTemplate:
    default = entries[_TEMPLATE].value if _TEMPLATE in entries else None
    named = [
        (key.removeprefix(f"{_TEMPLATE}."), str(entry.value))
        for key, entry in entries.items()
        if key.startswith(f"{_TEMPLATE}.")
    ]
    if not named:
        return default
    return (*((("default", str(default)),) if default else ()), *named)
