"""Stop strings: what ends an answer, and nothing else.

The rule: the special token that the chat template puts behind an answer, and the texts of the
end-of-generation tokens, without those that occur in the cue for an answer, mark thoughts or tool
calls, or stand between the parts of one answer (those the model must be able to write).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from .induce import ChatShape, mark
from .jinja_chat import JinjaChat, TemplateRefusedError

#: What looks like one special token, for models whose vocabulary is not at hand.
_SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|?>|<[\w:]+\|>|<｜[^｜<>]+｜>|〈\|[^|]+\|〉|</?[\w:.-]+>|<\[[^\]<>]+\]>|\[/?[A-Z_]+\]"
)
_THOUGHT_OR_TOOL = re.compile(r"think|thought|reason|tool|function|call|python|observation", re.I)


def stop_strings(
    chat: JinjaChat,
    shape: ChatShape,
    eog: Sequence[str] = (),
    specials: Collection[str] | None = None,
) -> tuple[str, ...]:
    """Return the stop strings of a chat model, in order of trust.

    Args:
        chat: its template.
        shape: the format found in it.
        eog: texts of the end-of-generation tokens (of generation_config and the tokenizer).
        specials: texts of all special tokens of the vocabulary; None if unknown.
    """
    inner = _inside_answers(chat, shape, specials)
    closing = [_first_free(text, inner, specials) for text in (shape.assistant_user, shape.end)]
    found: list[str] = []
    for token in [*closing, *eog]:
        if token.strip() and not _in_cue(token, shape) and not _THOUGHT_OR_TOOL.search(token):
            found.append(token)
    if not found and not special_tokens(shape.assistant_user, specials):
        words = re.match(r"\s*.*\S", shape.assistant_user)
        found += [words.group()] if words and words.group() not in shape.cue else []
    return tuple(dict.fromkeys(found))


def _in_cue(token: str, shape: ChatShape) -> bool:
    """Return whether a token belongs to the cue; one that separates all turns does not."""
    separates = shape.cue.startswith(token) and shape.end.lstrip().startswith(token)
    return token in shape.cue[len(token) if separates else 0 :]


def special_tokens(text: str, specials: Collection[str] | None) -> list[str]:
    """Return the special tokens of a text in order: those known, and all that look so.

    A text such as ``<|im_end|>`` ends turns even where the vocabulary has no one token for it.
    """
    known = sorted((s for s in specials or () if s and s in text), key=len, reverse=True)
    return re.findall("|".join([*map(re.escape, known), _SPECIAL.pattern]), text)


def _first_free(text: str, inner: Collection[str], specials: Collection[str] | None) -> str:
    """Return the first special token that a text begins with and that is not part of answers."""
    while True:
        text = text.lstrip()
        found = special_tokens(text, specials)
        if not found or not text.startswith(found[0]):
            return ""
        if found[0] not in inner:
            return found[0]
        text = text[len(found[0]) :]


def _inside_answers(
    chat: JinjaChat, shape: ChatShape, specials: Collection[str] | None
) -> frozenset[str]:
    """Return the special tokens between cue, thought, content and tool calls of one answer."""
    texts = [_after_cue(shape.user_assistant, shape), _after_cue(shape.user_last, shape)]
    thought, said, name = mark(71), mark(72), mark(73)
    call = {"type": "function", "id": "a1b2c3d4e", "function": {"name": name, "arguments": {}}}
    for extra in (
        {"reasoning_content": thought},
        {"reasoning": thought},
        {"thinking": thought},
        {"tool_calls": [call]},
        {"reasoning_content": thought, "tool_calls": [call]},
        {"thinking": thought, "tool_calls": [call]},
    ):
        answer: dict[str, Any] = {"role": "assistant", "content": said, **extra}
        try:
            text = chat.render(
                [{"role": "user", "content": mark(1)}, answer], generate=False, date=shape.dates
            )
        except TemplateRefusedError:
            continue
        texts += _between(text, (thought, said, name))
    return frozenset(token for text in texts for token in special_tokens(text, specials))


def _after_cue(text: str, shape: ChatShape) -> str:
    """Return what stands between the cue and an answer's content."""
    _, cue, rest = text.rpartition(shape.cue) if shape.cue else ("", "", "")
    return rest if cue else ""


def _between(text: str, marks: Sequence[str]) -> list[str]:
    """Return the texts between those of the marks that occur."""
    places = sorted((text.index(m), m) for m in marks if m in text)
    return [text[at + len(m) : after] for (at, m), (after, _) in pairwise(places)]
