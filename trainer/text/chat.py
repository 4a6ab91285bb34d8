"""Conversations as training text: rendered by the model's chat template, learned where it speaks.

What counts is what the model has to write itself: from the end of the generation prompt to the
token that ends its turn. Templates that enclose this in ``generation`` tags say so themselves; for
others it is found by rendering the conversation up to each turn, as it would be at inference. A
template that writes earlier turns differently later (dropping thoughts, say) makes one training
text per turn. Dates in templates are fixed, so that data do not change with the day.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from ...convert.ollama.jinja_chat import JinjaChat, TemplateRefusedError, compile_chat
from ...convert.tokenizers.chat_template import load_chat_template
from ...convert.tokenizers.files import TokenizerFiles
from ...convert.tokenizers.special import token_text
from ...errors import ConfigError, FormatError
from .documents import Chat, Completion
from .token_file import Encoded
from .tokenizer import Tokenizer

_MARKS = ("\ufdd0", "\ufdd1")  # noncharacters: no text has them
_TAG = re.compile(r"\{%[-+]?\s*generation\b")
_ENDS = (">", "\n", " ")
_DATE = date(2024, 7, 26).strftime

#: Characters [start, end) of a text that are learned.
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ChatEncoder:
    """Turns conversations into ids.

    Attributes:
        tokenizer: of the model.
        template: its chat template; None when it has none.
        tagged: whether ``template`` puts ``_MARKS`` around what is learned.
    """

    tokenizer: Tokenizer
    template: JinjaChat | None
    tagged: bool = False

    def conversation(self, chat: Chat, where: str) -> list[Encoded]:
        """Return the training texts of a conversation, usually one.

        Raises:
            ConfigError: the tokenizer has no chat template.
            FormatError: the template refuses the conversation, or does not show what it adds.
        """
        try:
            made = self.rendered(chat)
        except TemplateRefusedError as error:
            raise FormatError(f"{where}: {error}") from error
        return [self._encoded(text, spans) for text, spans in made]

    def completion(self, record: Completion) -> list[Encoded]:
        """Return prompt and completion as one document; the prompt is not learned."""
        tokenizer = self.tokenizer
        ids, starts = tokenizer.marked(record.prompt + record.completion)
        learned = [start >= len(record.prompt) for start in starts]
        if tokenizer.add_bos and tokenizer.bos is not None and ids[:1] != [tokenizer.bos]:
            ids, learned = [tokenizer.bos, *ids], [False, *learned]
        if tokenizer.eos is not None and ids[-1:] != [tokenizer.eos]:
            ids, learned = [*ids, tokenizer.eos], [*learned, True]
        return [(np.array(ids, np.int64), np.array(learned, np.uint8))]

    def rendered(self, chat: Chat) -> list[tuple[str, list[Span]]]:
        """Return texts with the characters that are learned.

        Raises:
            ConfigError, TemplateRefusedError: as ``conversation``.
        """
        if self.template is None:
            raise ConfigError(
                f"{self.tokenizer.folder}: has no chat template, which conversations need: put a "
                "chat_template.jinja beside the tokenizer"
            )
        turns = [
            i
            for i, message in enumerate(chat.messages)
            if message["role"] == "assistant" and i >= chat.given
        ]
        if self.tagged:
            return [self._tagged(self.template, chat, len(turns))]
        whole = self._said(self.template, chat, len(chat.messages))
        found = [self._turn(self.template, chat, turn) for turn in turns]
        if all(whole.startswith(text) for text, _ in found):
            return [(whole, [span for _, span in found])]
        return [(text, [span]) for text, span in found]

    def _turn(self, template: JinjaChat, chat: Chat, turn: int) -> tuple[str, Span]:
        """Return the text up to and including a turn, and which part of it the turn adds."""
        text = self._said(template, chat, turn + 1)
        prompt = self._said(template, chat, turn, generate=True)
        start = len(prompt)
        if not text.startswith(prompt):  # it may open a thought that the conversation lacks
            pairs = enumerate(zip(prompt, text, strict=False))
            start = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(text)))
            start = 1 + max(text.rfind(c, 0, start) for c in _ENDS)  # not inside a <tag>
        if start == len(text) or (turn and start < len(self._said(template, chat, turn))):
            raise TemplateRefusedError(
                f"chat template: what it writes for message {turn + 1} does not follow what it "
                "writes before; use generation tags in it, or one turn per conversation"
            )
        return text, (start, len(text))

    def _tagged(self, template: JinjaChat, chat: Chat, turns: int) -> tuple[str, list[Span]]:
        text, *pieces = self._said(template, chat, len(chat.messages)).split(_MARKS[0])
        spans = []
        for piece in pieces:
            inside, _, after = piece.partition(_MARKS[1])
            spans.append((len(text), len(text) + len(inside)))
            text += inside + after
        return text, spans[max(0, len(spans) - turns) :]  # the first may be given as prompt

    def _said(self, template: JinjaChat, chat: Chat, count: int, generate: bool = False) -> str:
        messages = chat.messages[:count]
        return template.render(messages, generate=generate, date=_DATE, tools=chat.tools)

    def _encoded(self, text: str, spans: list[Span]) -> Encoded:
        ids, starts = self.tokenizer.marked(text)
        places = np.array(starts, np.int64)
        learned = np.zeros(len(ids), np.uint8)
        names = {i: name for name, i in self.tokenizer.special.items()}
        for start, end in spans:
            inside = np.flatnonzero((places >= start) & (places < end))
            ends = [i for i in inside if ids[i] in names]
            if ends and not text[starts[ends[-1]] + len(names[ids[ends[-1]]]) : end].strip():
                inside = inside[inside <= ends[-1]]  # what follows the end of a turn is not said
            learned[inside] = 1
        if learned[-1:].any() and ids[-1] not in names and self.tokenizer.eos is not None:
            ids.append(self.tokenizer.eos)  # the template leaves the end of the last turn open
            learned = np.append(learned, np.uint8(1))
        return np.array(ids, np.int64), learned


def chat_encoder(tokenizer: Tokenizer) -> ChatEncoder:
    """Return the encoder of a tokenizer's folder, with its chat template if it has one.

    Raises:
        ConfigError: the template does not compile.
    """
    files = TokenizerFiles(tokenizer.folder)
    named = load_chat_template(files)
    source = named if isinstance(named, str) or named is None else dict(named).get("default")
    if not source:
        return ChatEncoder(tokenizer, None)
    tagged = _TAG.search(source) is not None
    try:
        template = compile_chat(source, _variables(files, tokenizer), _MARKS if tagged else None)
    except TemplateRefusedError as error:
        raise ConfigError(f"{tokenizer.folder}: {error}") from error
    return ChatEncoder(tokenizer, template, tagged)


def _variables(files: TokenizerFiles, tokenizer: Tokenizer) -> dict[str, str]:
    """Return ``bos_token`` and such, as transformers gives them to templates."""
    settings: Mapping[str, Any] = files.json("tokenizer_config.json") or {}
    found = {k: token_text(v) for k, v in settings.items() if k.endswith("_token")}
    names = {i: text for text, i in tokenizer.special.items()}
    own = {"bos_token": names.get(tokenizer.bos_id()), "eos_token": names.get(tokenizer.eos_id())}
    return {k: v for k, v in {**own, **found}.items() if isinstance(v, str)}
