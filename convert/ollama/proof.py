"""Prove a prompt template: the Go one and the model's own Jinja on the same conversations.

Every prompt must be the same byte for byte: system messages, several turns, Unicode, braces, an
answer to be continued. What no Go template can do (trim contents, drop old thoughts) is looked for
apart and told as a limit, since it shows only with contents of that kind.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import MconvError
from .go_template import parse_template
from .jinja_chat import JinjaChat, Message, TemplateRefusedError
from .prompt import ollama_prompt

_DAYS = (datetime.datetime(2024, 7, 26, 12), datetime.datetime(2025, 1, 5, 12))

#: Conversations by name.
CONVERSATIONS: tuple[tuple[str, tuple[Message, ...]], ...] = (
    ("one question", (("user", "Hello there"),)),
    ("system", (("system", "Be brief."), ("user", "Hello there"))),
    ("two turns", (("user", "Hi"), ("assistant", "Hello!"), ("user", "How are you?"))),
    (
        "system, three turns",
        (
            ("system", "You are a pirate.\nAlways."),
            ("user", "One?"), ("assistant", "Arr, 1."), ("user", "Two?"),
            ("assistant", "Arr, 2."), ("user", "Three?"),
        ),
    ),
    (
        "Unicode",
        (
            ("system", "Отвечай кратко — 漢字 ✓"), ("user", "Größe? 👩\u200d🚀 \u00a0\u3000é"),
            ("assistant", "１\u2581２"), ("user", "ありがとう"),
        ),
    ),
    (
        "braces",
        (
            ("user", "{{ .System }} {% if x %} {# c #} {{- \"q\" -}} }}{{"),
            ("assistant", '{"a": {"b": 1}}'), ("user", "`code` <b>&amp;</b> $x \\n"),
        ),
    ),
    (
        "lines and code",
        (
            ("system", "Rules:\n\n1. a\n2. b"),
            ("user", "```python\ndef f():\n    return '''x'''\n```\n\nWhat?"),
            ("assistant", "It returns:\n\n- x"), ("user", "And\tnow?"),
        ),
    ),
    (
        "five turns",
        tuple(
            ("user" if k % 2 == 0 else "assistant", f"turn {k}") for k in range(9)
        ),
    ),
    ("answer begun", (("user", "Count"), ("assistant", "1, 2,"))),
    (
        "system, answer begun later",
        (
            ("system", "Count up."), ("user", "Go"), ("assistant", "1"), ("user", "On"),
            ("assistant", "2, 3 and {"),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation: whether both prompts are the same, and what they are.

    ``refused`` has the reason where the model's own template does not take the conversation.
    """

    name: str
    same: bool
    expected: str
    got: str
    refused: str = ""

    @property
    def difference(self) -> str:
        """Where the prompts part, in words; empty when they do not."""
        if self.same or self.refused:
            return ""
        at = 0
        while at < min(len(self.expected), len(self.got)) and self.expected[at] == self.got[at]:
            at += 1
        return (
            f"after {self.expected[max(0, at - 20) : at]!r} the model's template says "
            f"{self.expected[at : at + 40]!r}, this one {self.got[at : at + 40]!r}"
        )


@dataclass(frozen=True, slots=True)
class Proof:
    """All conversations, and the limits of what was proven."""

    rows: tuple[Row, ...]
    limits: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether no prompt differs, and at least one was compared."""
        return all(row.same or row.refused for row in self.rows) and any(
            row.same for row in self.rows
        )

    @property
    def compared(self) -> int:
        """How many conversations the model's template takes."""
        return sum(not row.refused for row in self.rows)


def jinja_prompt(
    chat: JinjaChat, messages: Sequence[Message], day: datetime.datetime, bos: str = ""
) -> str:
    """Return the prompt of the model's own template, without ``bos`` if it begins with it.

    An answer to be continued is the last content; the prompt ends with it.

    Raises:
        TemplateRefusedError: the template does not take the conversation.
    """
    generate = messages[-1][0] != "assistant"
    text = chat.render(messages, generate=generate, date=day.strftime)
    if not generate:
        end = text.rfind(messages[-1][1])
        if end < 0:
            raise TemplateRefusedError("chat template: changes an answer that is to be continued")
        text = text[: end + len(messages[-1][1])]
    return text.removeprefix(bos)


def prove(chat: JinjaChat, template: str, bos: str = "") -> Proof:
    """Compare a Go template with the model's own template.

    Args:
        chat: the model's template.
        template: the Go template.
        bos: what the tokenizer puts in front itself, so that the Go template must not.
    """
    parsed = parse_template(template)
    rows = []
    for name, messages in CONVERSATIONS:
        expected = got = refused = ""
        same = True
        for day in _DAYS:
            try:
                expected = jinja_prompt(chat, messages, day, bos)
            except TemplateRefusedError as error:
                refused, same = str(error), False
                break
            try:
                got = ollama_prompt(parsed, messages, day.date())
            except MconvError as error:
                got = f"error: {error}"
            if got != expected:
                same = False
                break
        rows.append(Row(name, same, expected, got, refused))
    return Proof(tuple(rows), _limits(chat))


def _limits(chat: JinjaChat) -> tuple[str, ...]:
    """Look for what the model's template does with contents, and Go templates cannot."""
    limits = []
    for role in ("system", "user", "assistant"):
        if _changes(chat, role, "  padded \n"):
            limits.append(f"the model's template trims white space around {role} messages")
    if _changes(chat, "assistant", "<think>\nwhy\n</think>\n\nbecause"):
        limits.append("the model's template drops or rewrites <think> blocks of earlier answers")
    if _changes(chat, "assistant", ""):
        limits.append("the model's template prints empty answers in another way")
    if not _takes(chat, (("system", "s"), ("user", "u"))):
        limits.append(
            "the model's template refuses system messages; here they go before the first question"
        )
    return tuple(limits)


def _takes(chat: JinjaChat, messages: Sequence[Message]) -> bool:
    try:
        chat.render(messages)
    except TemplateRefusedError:
        return False
    return True


def _changes(chat: JinjaChat, role: str, content: str) -> bool:
    """Return whether one content is printed in another way than a plain word in its place."""
    plain = "Qplaincontentq"
    texts = []
    for text in (plain, content):
        messages = [("system", text)] if role == "system" else []
        messages.append(("user", text if role == "user" else "question"))
        if role == "assistant":
            messages += [("assistant", text), ("user", "more")]
        try:
            texts.append(chat.render(messages, date=_DAYS[0].strftime))
        except TemplateRefusedError:
            return False
    return plain in texts[0] and texts[0].replace(plain, content) != texts[1]
