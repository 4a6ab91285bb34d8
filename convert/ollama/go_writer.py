"""Write the constants of a chat format as a Go template for Ollama.

The template walks ``.Messages`` once, remembering whose message came before, so that a conversation
may end with the user (the generation prompt follows) or with an answer to be continued (nothing
follows). Messages of one role in a row are joined by a blank line, as Ollama itself does.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .dates import DateMarks
from .induce import ChatShape

_LAST = "(eq (len (slice $.Messages $i)) 1)"
_BRACES = re.compile(r"\{\{+|\{$")
_JOINED = '{{ else if eq $before "%s" }}\n\n'


def without_bos(shape: ChatShape, bos: str) -> ChatShape:
    """Return the format without its first token, for models whose tokenizer adds it itself."""
    if not bos:
        return shape
    return replace(
        shape,
        head=shape.head.removeprefix(bos),
        before_system=shape.before_system.removeprefix(bos)
        if shape.place == "first"
        else shape.before_system,
    )


def go_template(shape: ChatShape) -> str:
    """Return the Go template of a chat format.

    Raises:
        ValueError: a date format has no Go form (see ``DateMarks.inexpressible``).
    """
    write = _Writer(shape.dates).text
    out = shape.dates.preamble() + _head(shape)
    if shape.place == "last user":
        out += (
            '{{ $last := -1 }}{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}'
            "{{ $last = $i }}{{ end }}{{ end }}"
        )
    out += '{{ $before := "" }}{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}'
    out += '{{ if eq $before "assistant" }}' + write(shape.assistant_user)
    out += _JOINED % "user" + "{{ end }}" + _late_system(shape)
    out += '{{ $m.Content }}{{ $before = "user" }}{{ else if eq $m.Role "assistant" }}'
    out += '{{ if eq $before "user" }}'
    if shape.user_last == shape.user_assistant:
        out += write(shape.user_assistant)
    else:
        out += "{{ if " + _LAST + " }}" + write(shape.user_last)
        out += "{{ else }}" + write(shape.user_assistant) + "{{ end }}"
    out += _JOINED % "assistant" + "{{ end }}"
    out += '{{ $m.Content }}{{ $before = "assistant" }}{{ end }}{{ end }}'
    return out + '{{ if eq $before "user" }}' + write(shape.generation) + "{{ end }}"


def _head(shape: ChatShape) -> str:
    write = _Writer(shape.dates).text
    head = write(shape.head)
    if shape.place == "refused":
        return head + "{{ if .System }}{{ .System }}\n\n{{ end }}"
    if shape.place != "first":
        return head
    before, after = write(shape.before_system), write(shape.after_system)
    return f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{head}{{{{ end }}}}"


def _late_system(shape: ChatShape) -> str:
    write = _Writer(shape.dates).text
    if shape.place not in ("last user", "last message"):
        return ""
    when = "(eq $i $last)" if shape.place == "last user" else _LAST
    return (
        f"{{{{ if and $.System {when} }}}}{write(shape.before_system)}{{{{ $.System }}}}"
        f"{write(shape.after_system)}{{{{ end }}}}"
    )


class _Writer:
    """Writes constants, with dates as actions."""

    def __init__(self, dates: DateMarks) -> None:
        self.dates = dates

    def text(self, constant: str) -> str:
        """Return a constant as template text; braces that would open an action are quoted."""
        return "".join(
            piece if actions else _BRACES.sub(lambda m: f'{{{{ "{m.group()}" }}}}', piece)
            for piece, actions in self.dates.split(constant)
        )
