"""Special tokens: their ids and whether they are put around a prompt.

Sources, in order of trust: the post-processor of ``tokenizer.json``, ``tokenizer_config.json``,
``config.json``. The rules are those of llama.cpp's converter, so that the keys come out equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .files import TokenizerFiles
from .vocabulary import Specials

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(slots=True)
class _State:
    """What is known so far: token text by role, roles to look up, ``add_*_token`` by role."""

    named: dict[str, str | None]
    has_config: bool
    roles: list[str] = field(default_factory=lambda: list(ROLES))
    add: dict[str, bool] = field(default_factory=dict)


def load_specials(
    files: TokenizerFiles, config: Mapping[str, Any] | None, limit: int | None = None
) -> Specials:
    """Return the special tokens of a tokenizer.

    Args:
        files: the tokenizer's folder.
        config: the model's ``config.json``, whose ``*_token_id`` fill what is missing.
        limit: ids from here on are dropped.
    """
    tokenizer = files.json("tokenizer.json")
    settings = files.json("tokenizer_config.json")
    state = _State(
        {
            role: token_text((settings or {}).get(f"{role}_token"))
            for role in (*ROLES, "eot", "eom")
        },
        settings is not None,
    )
    lowercase = strip_accents = None
    if tokenizer is not None:
        lowercase, strip_accents = _normalizer(tokenizer.get("normalizer"))
        _read_post_processor(state, tokenizer.get("post_processor"))
    ids: dict[str, int] = {}
    if settings is not None:
        _read_settings(state, settings, tokenizer, ids, limit)
    for role in state.roles:
        _set(ids, role, _config_id(config or {}, role), limit)
    return Specials(ids, state.add, lowercase, strip_accents)


def token_text(entry: object) -> str | None:
    """Return the text of a token entry: a string, or an object with ``content``."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _set(ids: dict[str, int], role: str, value: object, limit: int | None) -> None:
    if not isinstance(value, int) or value < 0 or (limit is not None and value >= limit):
        return
    ids.setdefault(role, value)


def _config_id(config: Mapping[str, Any], role: str) -> object:
    value = config.get(f"{role}_token_id")
    inner = config.get("text_config")
    if value is None and isinstance(inner, Mapping):
        value = inner.get(f"{role}_token_id")
    return value


def _normalizer(normalizer: object) -> tuple[bool | None, bool | None]:
    """Return (lowercase, strip accents) as far as the normalizer says."""
    lowercase = strip = None
    for step in flat(normalizer, "normalizers"):
        kind = step.get("type")
        if kind == "Lowercase":
            lowercase = True
        elif kind == "StripAccents":
            strip = True
        elif kind == "BertNormalizer":
            lowercase = step.get("lowercase", lowercase)
            strip = step.get("strip_accents", strip)
    return lowercase, strip


def flat(node: object, inner: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or post-processor, sequences unrolled."""
    if not isinstance(node, Mapping):
        return []
    if node.get("type") != "Sequence":
        return [node]
    return [step for part in node.get(inner) or () for step in flat(part, inner)]


def _read_post_processor(state: _State, node: object) -> None:
    named = state.named
    named["bos"] = named["bos"] or named["cls"]
    named["eos"] = named["eos"] or named["sep"]
    for step in flat(node, "processors"):
        kind = step.get("type")
        if kind == "ByteLevel":
            state.add.setdefault("bos", False)
            state.add.setdefault("eos", False)
        elif kind == "RobertaProcessing":
            state.add.update(bos=True, eos=True, sep=True)
            named["cls"] = named["cls"] or _first(step.get("cls"), named["bos"])
            named["sep"] = named["sep"] or _first(step.get("sep"), named["eos"])
        elif kind == "TemplateProcessing":
            _read_template(state, step)


def _first(pair: object, otherwise: str | None) -> str | None:
    if isinstance(pair, Sequence) and pair and isinstance(pair[0], str):
        return pair[0]
    return otherwise


def _special(item: Mapping[str, Any]) -> str | None:
    token = item.get("SpecialToken") if isinstance(item, Mapping) else None
    return token_text(token.get("id")) if isinstance(token, Mapping) else None


def _read_template(state: _State, step: Mapping[str, Any]) -> None:
    """Read which tokens a TemplateProcessing puts first, last and between two sequences."""
    single, pair = list(step.get("single") or ()), list(step.get("pair") or ())
    first = last = None
    if len(single) > 1:
        first, last = _special(single[0]), _special(single[-1])
        if first:
            _read_first(state, first)
        if last:
            _read_last(state, last)
    if pair and first and _special(pair[0]) == first:
        pair = pair[1:]
    if pair and last and _special(pair[-1]) == last:
        pair = pair[:-1]
    if len(pair) > 2 and _sequence(pair[0]) == "A" and _sequence(pair[-1]) == "B":
        _read_between(state, pair[1:-1], last)


def _sequence(item: Mapping[str, Any]) -> str | None:
    return (item.get("Sequence") or {}).get("id")


def _read_first(state: _State, first: str) -> None:
    named = state.named
    if not state.has_config:
        named["bos"] = first
    elif first not in (named["bos"], named["cls"]):
        named["bos"] = named["bos"] or first
        named["cls"] = named["cls"] or first
    state.add["bos"] = first in (named["bos"], named["cls"])


def _read_last(state: _State, last: str) -> None:
    """A template may end with another token than ``eos``; the old one then ends a turn."""
    named = state.named
    if state.has_config and last != named["eos"]:
        for role in ("eot", "eom"):
            if role not in state.roles:
                state.roles.append(role)
                named[role] = named["eos"]
                break
    named["eos"] = last
    state.add["eos"] = True


def _read_between(state: _State, between: list[Mapping[str, Any]], last: str | None) -> None:
    named = state.named
    known = (named["sep"], named["eos"])
    first = _special(between[0])
    add = first is not None and first in known and not last
    if len(between) == 2 and (second := _special(between[1])) is not None:
        add = add or second in known
    state.add["sep"] = add
    if add and not named["sep"] and state.has_config:
        named["sep"] = named["eos"]


def _read_settings(
    state: _State,
    settings: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None,
    ids: dict[str, int],
    limit: int | None,
) -> None:
    found: dict[str, int] = {}
    for token in (tokenizer or {}).get("added_tokens") or ():
        found.setdefault(token.get("content"), token.get("id"))
    for role in state.roles:
        add = settings.get(f"add_{role}_token")
        if isinstance(add, bool):
            state.add.setdefault(role, add)
        text = state.named.get(role)
        if text is not None:
            _set(ids, role, found.get(text), limit)
