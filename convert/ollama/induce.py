"""Find the constants of a chat format by looking at what the Jinja template prints.

No table of known models: marked contents go through the template in conversations of one to three
turns, with and without a system message, and the prompts are cut at the marks. If the pieces
between the marks agree across turns, they are the format; if not, the error names what varies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...errors import UnsupportedError
from .dates import DateMarks
from .jinja_chat import JinjaChat, Message, TemplateRefusedError

SystemPlace = Literal["first", "last user", "last message", "dropped", "refused"]


class NotInducedError(UnsupportedError):
    """A chat template is more than constants around contents."""


@dataclass(frozen=True, slots=True)
class ChatShape:
    """A chat format as constants.

    Attributes:
        head: before the first user message, when there is no system message.
        place: where a system message goes: in front; before the last user message; before the last
            message if that is the user's; nowhere; or the template refuses it.
        before_system, after_system: around it. In front, they replace ``head``; otherwise they come
            between the usual text and the user's content.
        user_assistant: from a user message to an answer that is followed by another message.
        user_last: the same for an answer that ends the conversation, to be continued.
        assistant_user: from an answer to the next user message.
        generation: after the last user message.
        cue: the part of ``generation`` that asks for an answer; the rest ends the user's turn.
        end: after an answer that ends the conversation.
        dates: the date formats that the constants' marks stand for.
    """

    head: str
    place: SystemPlace
    before_system: str
    after_system: str
    user_assistant: str
    user_last: str
    assistant_user: str
    generation: str
    cue: str
    end: str
    dates: DateMarks = field(compare=False)


def mark(k: int) -> str:
    """Return the content number ``k``: letters and digits that no template prints itself."""
    return f"Qz{k}contentz{k}Q"


_SYSTEM = mark(0)


def conversation(turns: str, system: bool = False) -> list[Message]:
    """Return marked messages for ``turns``, a text such as ``"uau"``."""
    roles = {"u": "user", "a": "assistant"}
    messages: list[Message] = [(roles[t], mark(k)) for k, t in enumerate(turns, 1)]
    return [("system", _SYSTEM), *messages] if system else messages


def induce(chat: JinjaChat) -> ChatShape:
    """Return the constants of a chat template.

    Raises:
        NotInducedError: the template refuses plain conversations, or its constants vary; the
            message says which.
    """
    return _Inducer(chat, DateMarks()).shape()


@dataclass(slots=True)
class _Inducer:
    chat: JinjaChat
    dates: DateMarks

    def shape(self) -> ChatShape:
        one = self._pieces("u")
        three = [self._pieces("uau"), self._pieces("uauau")]
        last = [self._pieces("ua"), self._pieces("uaua")]
        head = _same("the text before the first user message", [p[0] for p in (one, *three, *last)])
        generation = _same("the generation prompt", [p[-1] for p in (one, *three)])
        middle = [*three, last[1][:-2]]
        to_assistant = [p[k] for p in middle for k in range(1, len(p) - 1, 2)]
        to_user = [p[k] for p in (*three, last[1][:-1]) for k in range(2, len(p) - 1, 2)]
        place, before, after = self._system()
        return ChatShape(
            head=head,
            place=place,
            before_system=before,
            after_system=after,
            user_assistant=_same("the text before earlier answers", to_assistant),
            user_last=_same("the text before a last answer", [p[-2] for p in last]),
            assistant_user=_same("the text between turns", to_user),
            generation=generation,
            cue=self._cue(generation),
            end=_same("the text after a last answer", [p[-1] for p in last]),
            dates=self.dates,
        )

    def _render(self, turns: str, system: bool = False, generate: bool | None = None) -> str:
        ask = turns.endswith("u") if generate is None else generate
        try:
            return self.chat.render(conversation(turns, system), generate=ask, date=self.dates)
        except TemplateRefusedError as error:
            raise NotInducedError(f"{error} (in a conversation {_names(turns, system)})") from None

    def _pieces(self, turns: str) -> list[str]:
        """Cut the prompt of ``turns`` at its contents."""
        text = self._render(turns)
        return _cut(text, [mark(k) for k in range(1, len(turns) + 1)], _names(turns, False))

    def _cue(self, generation: str) -> str:
        """Return what the generation prompt adds to the end of a user's turn."""
        closed = _cut(self._render("u", generate=False), [mark(1)], "user")[-1]
        pairs = zip(generation, closed, strict=False)
        at = next(
            (k for k, (a, b) in enumerate(pairs) if a != b), min(len(generation), len(closed))
        )
        while at and at < len(generation) and generation[at] not in "<[〈":
            if generation[at - 1].isspace():
                break
            at -= 1  # not inside a token
        return generation[at:]

    def _system(self) -> tuple[SystemPlace, str, str]:
        try:
            texts = {turns: self._render(turns, True) for turns in ("u", "uau", "uauau", "ua")}
        except NotInducedError:
            return "refused", "", ""
        place: SystemPlace = "last user"
        if _SYSTEM not in texts["ua"] and _SYSTEM in texts["u"]:
            self._same_without(texts.pop("ua"), "ua")
            place = "last message"
        counts = {text.count(_SYSTEM) for text in texts.values()}
        if counts == {0}:
            return self._dropped(texts)
        if counts != {1}:
            raise NotInducedError("chat template: prints the system message more than once")
        if all(text.index(_SYSTEM) < text.index(mark(1)) for text in texts.values()):
            return self._first(texts)
        return (place, *self._last_user(texts))

    def _dropped(self, texts: dict[str, str]) -> tuple[SystemPlace, str, str]:
        for turns, text in texts.items():
            self._same_without(text, turns)
        return "dropped", "", ""

    def _same_without(self, text: str, turns: str) -> None:
        if text != self._render(turns):
            raise NotInducedError("chat template: drops the system message but changes others")

    def _first(self, texts: dict[str, str]) -> tuple[SystemPlace, str, str]:
        before, after = [], []
        for turns, text in texts.items():
            pieces = _cut(text, [mark(k) for k in range(len(turns) + 1)], _names(turns, True))
            before.append(pieces[0])
            after.append(pieces[1])
            if pieces[2:] != self._pieces(turns)[1:]:
                raise NotInducedError(
                    "chat template: a system message changes the text around later messages"
                )
        return (
            "first",
            _same("the text before the system message", before),
            _same("the text after the system message", after),
        )

    def _last_user(self, texts: dict[str, str]) -> tuple[str, str]:
        """The system message stands before the last user message, after the usual text."""
        before, after = [], []
        for turns, text in texts.items():
            users = [k for k, turn in enumerate(turns, 1) if turn == "u"]
            order = [mark(k) for k in range(1, len(turns) + 1)]
            order.insert(users[-1] - 1, _SYSTEM)
            pieces = _cut(text, order, _names(turns, True))
            usual = self._pieces(turns)
            at = users[-1] - 1
            if not pieces[at].startswith(usual[at]) or (
                pieces[:at] + pieces[at + 2 :] != usual[:at] + usual[at + 1 :]
            ):
                raise NotInducedError(
                    "chat template: a system message changes the text around other messages"
                )
            before.append(pieces[at][len(usual[at]) :])
            after.append(pieces[at + 1])
        return (
            _same("the text before the system message", before),
            _same("the text after the system message", after),
        )


def _names(turns: str, system: bool) -> str:
    words = ["system"] if system else []
    return ", ".join(words + ["user" if t == "u" else "assistant" for t in turns])


def _cut(text: str, marks: Sequence[str], names: str) -> list[str]:
    """Cut a prompt at its marks, each of which must occur once and in order."""
    pieces = []
    for m in marks:
        if text.count(m) != 1:
            raise NotInducedError(
                f"chat template: prints a message {text.count(m)} times in a conversation {names}"
            )
        before, _, text = text.partition(m)
        if any(other in before for other in marks):
            raise NotInducedError(f"chat template: reorders the messages of {names}")
        pieces.append(before)
    return [*pieces, text]


def _same(what: str, texts: Sequence[str]) -> str:
    first = texts[0]
    for text in texts[1:]:
        if text != first:
            raise NotInducedError(
                f"chat template: {what} varies: {first[-60:]!r} and {text[-60:]!r}"
            )
    return first
