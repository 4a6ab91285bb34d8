"""Render a model's Jinja chat template as transformers and llama.cpp do, sandboxed.

Source: the chat template conventions of transformers: ``trim_blocks`` and ``lstrip_blocks``, loop
controls, a ``generation`` tag, ``tojson`` without HTML escapes, ``raise_exception``,
``strftime_now``; special tokens such as ``bos_token`` are variables. A template comes from a
checkpoint, so it runs in Jinja's immutable sandbox, with bounded output.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from ...errors import UnsupportedError

#: A chat message: role and content.
Message = tuple[str, str]

_MAX_OUTPUT = 1 << 20


class TemplateRefusedError(UnsupportedError):
    """A chat template does not take a conversation: ``raise_exception``, or a failure inside."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` encloses what a model writes; for a prompt it changes nothing.

    With ``generation_marks`` in the environment, these two texts are put around it.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks: Sequence[str] = getattr(self.environment, "generation_marks", ())
        if not marks:
            return body
        first, last = (nodes.Output([nodes.TemplateData(m)], lineno=line) for m in marks)
        return [first, *body, last]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@dataclass(frozen=True, slots=True)
class JinjaChat:
    """A compiled chat template.

    Attributes:
        source: its text.
        tokens: special tokens by variable, such as ``bos_token``.
        parts: whether contents are given as lists of parts, for templates that take no text.
    """

    source: str
    tokens: Mapping[str, str]
    parts: bool = False
    _template: jinja2.Template = field(repr=False, kw_only=True, compare=False)

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        generate: bool = True,
        date: Callable[[str], str] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Return the prompt of a conversation.

        Args:
            messages: (role, content), or whole messages for more fields.
            generate: add the generation prompt.
            date: gives the current date in a ``strftime`` format; by default the present.
            tools: functions that the model may call, as JSON schemas.

        Raises:
            TemplateRefusedError: the template refuses the conversation or fails.
        """
        chat = [self._message(m) for m in messages]
        now = date or datetime.datetime.now().strftime
        context = {
            **self.tokens,
            "messages": chat,
            "add_generation_prompt": generate,
            **({"tools": list(tools)} if tools else {}),
            "strftime_now": now,
            "raise_exception": _raise,
        }
        try:
            out, size = [], 0
            for piece in self._template.generate(context):
                size += len(piece)
                if size > _MAX_OUTPUT:
                    raise TemplateRefusedError("chat template: writes more than 1 MB")
                out.append(piece)
            return "".join(out)
        except TemplateRefusedError:
            raise
        except Exception as error:  # a template may fail in any way Python can
            raise TemplateRefusedError(f"chat template: {type(error).__name__}: {error}") from None

    def _message(self, message: Message | Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(message, tuple):
            message = {"role": message[0], "content": message[1]}
        content = message.get("content")
        if self.parts and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        return dict(message)


def compile_chat(
    source: str, tokens: Mapping[str, str] | None = None, marks: tuple[str, str] | None = None
) -> JinjaChat:
    """Compile a chat template; one that prints contents only as parts gets parts.

    Args:
        source: the template.
        tokens: special tokens by variable name.
        marks: texts to put around what the template encloses in ``generation`` tags.

    Raises:
        TemplateRefusedError: it does not compile.
    """
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals.pop("lipsum", None)
    env.extend(generation_marks=marks or ())
    try:
        template = env.from_string(source)
    except jinja2.TemplateError as error:
        raise TemplateRefusedError(f"chat template: does not compile: {error}") from None
    known = dict(tokens or {})
    for parts in (False, True):
        chat = JinjaChat(source, known, parts, _template=template)
        try:
            if "QprobeQ" in chat.render([("user", "QprobeQ")]):
                return chat
        except TemplateRefusedError:
            continue
    return JinjaChat(source, known, False, _template=template)
