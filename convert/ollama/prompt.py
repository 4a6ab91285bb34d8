"""What Ollama puts into a Go template, and what it makes of a conversation.

Source: Ollama's template environment: ``.System`` joins all system messages by blank lines,
``.Messages`` holds all messages, those of one role in a row joined. (A template of
the old kind, without ``.Messages``, runs once per turn; mconv writes none.)
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import ClassVar

from .go_template import Struct, Template
from .go_template.values import JsonList
from .jinja_chat import Message

_SEPARATOR = "\n\n"


class ChatMessage(Struct):
    """A message as templates see it."""

    json_names: ClassVar = {
        "Role": "role",
        "Content": "content",
        "Thinking": "thinking",
        "Images": "images",
        "ToolCalls": "tool_calls",
        "ToolName": "tool_name",
        "ToolCallID": "tool_call_id",
    }
    json_optional = frozenset({"Thinking", "Images", "ToolCalls", "ToolName", "ToolCallID"})


def merged(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with those of one role in a row joined."""
    out: list[Message] = []
    for role, content in messages:
        if out and out[-1][0] == role:
            out[-1] = (role, out[-1][1] + _SEPARATOR + content)
        else:
            out.append((role, content))
    return out


def ollama_prompt(
    template: Template, messages: Sequence[Message], today: datetime.date | None = None
) -> str:
    """Return the prompt that Ollama makes of a conversation with a Go template.

    Args:
        template: parsed; it walks ``.Messages``.
        messages: the conversation.
        today: what ``currentDate`` says.

    Raises:
        GoTemplateError: the template fails.
    """
    joined = merged(messages)
    system = _SEPARATOR.join(content for role, content in joined if role == "system")
    data = {
        "System": system,
        "Messages": [
            ChatMessage(
                Role=role, Content=content, Thinking="", Images=[], ToolCalls=[], ToolName="",
                ToolCallID="",
            )
            for role, content in joined
        ],
        "Tools": JsonList(),
        "Response": "",
        "Suffix": "",
        "Think": False,
        "ThinkLevel": "",
        "IsThinkSet": False,
    }  # fmt: skip
    return template.render(data, today)
