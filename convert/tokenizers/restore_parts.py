"""What the restorers of tokenizers share: added tokens, names of special tokens, templates.

Everything is written so that ``special.load_specials`` finds the same ids and flags again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from ...errors import FormatError
from .special import ROLES
from .vocabulary import TokenType, Vocabulary

_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False}


def json_bytes(value: Any) -> bytes:
    """Return a JSON file. Raises FormatError for texts that are not UTF-8."""
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(
            f"the vocabulary holds a token that is not UTF-8 text: {error}"
        ) from error


def added_token(
    index: int, text: str, *, special: bool, normalized: bool = False
) -> dict[str, Any]:
    """Return an entry of ``added_tokens``."""
    return {"id": index, "content": text, **_PLAIN, "normalized": normalized, "special": special}


def is_padding(vocabulary: Vocabulary, index: int) -> bool:
    """Return whether an id has no token of its own."""
    return (
        vocabulary.types[index] in (TokenType.UNUSED, TokenType.UNKNOWN)
        and vocabulary.tokens[index] == f"[PAD{index}]"
    )


def settings_of(
    vocabulary: Vocabulary, texts: Sequence[str], nameable: Collection[int], implied: set[str]
) -> dict[str, Any]:
    """Return the special tokens and flags for ``tokenizer_config.json``.

    Ids are read from these settings first, in the order of roles, then from ``config.json``: those
    that the file has in another order are left to the latter.

    Args:
        vocabulary: the vocabulary.
        texts: its tokens.
        nameable: ids of added tokens; only those are found by name.
        implied: roles whose flags the post-processor says.
    """
    ids, add = vocabulary.specials.ids, vocabulary.specials.add
    named: dict[str, str] = {}
    place = -1
    for role, index in ids.items():
        if role not in ROLES or index not in nameable or ROLES.index(role) < place:
            break
        place = ROLES.index(role)
        named[role] = texts[index]
    if "eot" in ids and "eos" in named and add.get("eos"):  # the template's end is eos, not this
        named["eos"] = texts[ids["eot"]]
    return {
        **{f"{role}_token": text for role, text in named.items()},
        **{f"add_{role}_token": on for role, on in add.items() if role not in implied},
    }


def said_roles(vocabulary: Vocabulary) -> set[str]:
    """Return the roles that the post-processor of ``template_of`` puts around a text."""
    add, ids = vocabulary.specials.add, vocabulary.specials.ids
    return {role for role in ("bos", "eos") if add.get(role) and role in ids}


def template_of(vocabulary: Vocabulary, texts: Sequence[str]) -> dict[str, Any] | None:
    """Return the post-processor that puts bos and eos around a text; None when none is put."""
    add, ids, said = vocabulary.specials.add, vocabulary.specials.ids, said_roles(vocabulary)
    ends = [texts[ids[role]] if role in said else None for role in ("bos", "eos")]
    if not any(ends):
        return None
    return {
        "type": "TemplateProcessing",
        "single": _around(ends, "A", 0),
        "pair": _pair(ends, apart="sep" in add),
        "special_tokens": {
            t: {"id": t, "ids": [texts.index(t)], "tokens": [t]} for t in ends if t is not None
        },
    }


def _pair(ends: Sequence[str | None], *, apart: bool) -> list[dict[str, Any]]:
    """Two texts. What stands between them tells whether separators are added: it may be nothing."""
    first, second = _around(ends, "A", 0), _around(ends, "B", 1)
    if apart:
        return [*first, *second]
    return [*(first[:-1] if ends[1] else first), *(second[1:] if ends[0] else second)]


def _around(ends: Sequence[str | None], name: str, type_id: int) -> list[dict[str, Any]]:
    first, last = ([{"SpecialToken": {"id": t, "type_id": type_id}}] if t else [] for t in ends)
    return [*first, {"Sequence": {"id": name, "type_id": type_id}}, *last]
