"""Recognize a byte-level BPE pre-tokenizer by the structure of its ``tokenizer.json``.

The splitting steps are brought to one spelling and looked up in ``pre_table``. The vocabulary does
not matter, so a fine-tune with added or retrained tokens is recognized like its base model.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any

from ...errors import ConfigError, did_you_mean
from .hf_json import BpeTokenizer
from .pre_table import (
    BYTE_LEVEL,
    CLASS_NAMES,
    DIGIT,
    DIGITS,
    NAMES,
    PUNCTUATION,
    STRUCTURES,
    NameRule,
)

#: Spellings of the English contractions that mean the same, longest first.
_CONTRACTIONS = (
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    "'(?i:[sdmt]|ll|ve|re)",
)
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("\t", r"\t"),
    *((text, "<contraction>") for text in _CONTRACTIONS),
    ("?+", "?"),
    ("++", "+"),
    ("*+", "*"),
    ("{1}", ""),
)


def find_pre(tokenizer: BpeTokenizer, override: str | None = None) -> str:
    """Return llama.cpp's name of a tokenizer's pre-tokenizer.

    Args:
        tokenizer: the tokenizer.
        override: a name chosen by the user, taken as it is when llama.cpp knows it.

    Raises:
        ConfigError: the structure is unknown (the message shows its regexes and the closest known
            names), or ``override`` is not a name of llama.cpp.
    """
    if override is not None:
        known_names = NAMES.split()
        if override not in known_names:
            hint = did_you_mean(override, known_names) or f"; known: {', '.join(known_names)}"
            raise ConfigError(f"unknown pre-tokenizer {override!r}{hint}")
        return override
    if not tokenizer.document:
        return _by_class(tokenizer)
    steps = pre_steps(tokenizer.document.get("pre_tokenizer"))
    for known, rules in _known():
        if _matches(steps, known):
            return next(rule.name for rule in rules if _applies(rule, tokenizer))
    raise ConfigError(_unknown(tokenizer, steps))


def pre_steps(node: object) -> tuple[str, ...]:
    """Return the splitting steps of a ``pre_tokenizer`` object in canonical spelling."""
    if not isinstance(node, Mapping):
        return ()
    kind = node.get("type")
    if kind == "Sequence":
        return tuple(step for part in node.get("pretokenizers") or () for step in pre_steps(part))
    if kind == "Split":
        return (_split(node),)
    if kind == "ByteLevel":
        return (canonical(BYTE_LEVEL),) if node.get("use_regex", True) else ()
    if kind == "Digits":
        return (DIGIT if node.get("individual_digits") else DIGITS,)
    return (PUNCTUATION if kind == "Punctuation" else f"<{kind}>",)


def canonical(regex: str) -> str:
    """Return a regex in one spelling: escapes, contractions and possessive quantifiers unified."""
    for text, spelling in _SPELLINGS:
        regex = regex.replace(text, spelling)
    return regex


def _split(node: Mapping[str, Any]) -> str:
    pattern = node.get("pattern") or {}
    regex = pattern.get("Regex")
    if not isinstance(regex, str):
        return f"<literal {pattern.get('String')!r}>"
    # removing what does not match equals isolating matches when the regex covers all text
    behavior = str(node.get("behavior", "")).lower()
    plain = (behavior, bool(node.get("invert"))) in (("isolated", False), ("removed", True))
    return canonical(regex) if plain else f"<{behavior}> {canonical(regex)}"


@cache
def _known() -> tuple[tuple[tuple[str, ...], tuple[NameRule, ...]], ...]:
    return tuple((tuple(canonical(step) for step in s.steps), s.rules) for s in STRUCTURES)


def _matches(steps: tuple[str, ...], known: tuple[str, ...]) -> bool:
    return len(steps) == len(known) and all(
        step.startswith(want[:-1]) if want.endswith("…") else step == want
        for step, want in zip(steps, known, strict=True)
    )


def _applies(rule: NameRule, tokenizer: BpeTokenizer) -> bool:
    document = tokenizer.document
    ignore = bool(tokenizer.model.get("ignore_merges", False))
    clean_up = bool(tokenizer.settings.get("clean_up_tokenization_spaces", True))
    normalizers = _types(document.get("normalizer"), "normalizers") or {"none"}
    processors = _types(document.get("post_processor"), "processors")
    return (
        rule.ignore_merges in (None, ignore)
        and rule.clean_up in (None, clean_up)
        and (not rule.normalizer or rule.normalizer in normalizers)
        and (not rule.post_processor or rule.post_processor in processors)
        and all(tokenizer.has(token) for token in rule.tokens)
    )


def _types(node: object, inner: str) -> set[str]:
    if not isinstance(node, Mapping):
        return set()
    if node.get("type") == "Sequence":
        parts = node.get(inner) or ()
        return set().union(*(_types(part, inner) for part in parts)) if parts else set()
    return {str(node.get("type"))}


def _by_class(tokenizer: BpeTokenizer) -> str:
    name = str(tokenizer.settings.get("tokenizer_class", "")).removesuffix("Fast")
    if name in CLASS_NAMES:
        return CLASS_NAMES[name]
    raise ConfigError(
        f"{tokenizer.path}: without a tokenizer.json the pre-tokenizer follows from "
        f"tokenizer_class, which is {name or 'not given'}; known: {', '.join(CLASS_NAMES)}. "
        "Choose one with --pre NAME"
    )


def _unknown(tokenizer: BpeTokenizer, steps: tuple[str, ...]) -> str:
    joined = "\n".join(steps)
    ranked = sorted(
        _known(),
        key=lambda item: -difflib.SequenceMatcher(None, joined, "\n".join(item[0])).ratio(),
    )
    names = ", ".join(rules[-1].name for _, rules in ranked[:3])
    shown = "\n  ".join(steps) or "(none)"
    return (
        f"{tokenizer.path}: unknown pre-tokenizer; it splits text with\n  {shown}\n"
        f"Closest known: {names}. If llama.cpp splits the same way under one of its names, "
        "choose it with --pre NAME"
    )
