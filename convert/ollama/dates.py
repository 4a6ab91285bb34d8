"""Dates in prompts: what a ``strftime`` format becomes in a Go template.

Source: Ollama's ``currentDate`` gives YYYY-MM-DD and nothing else; ``slice`` cuts year, month and
day out of it, and a chain of ``if`` names the month. Times and weekdays cannot be had that way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: strftime directives to Go actions; ``$d`` is the date, ``$month`` and ``$mon`` names.
_DIRECTIVES = {
    "%Y": "{{ slice $d 0 4 }}",
    "%m": "{{ slice $d 5 7 }}",
    "%d": "{{ slice $d 8 10 }}",
    "%y": "{{ slice $d 2 4 }}",
    "%F": "{{ $d }}",
    "%B": "{{ $month }}",
    "%b": "{{ $mon }}",
    "%-d": '{{ if ne (slice $d 8 9) "0" }}{{ slice $d 8 9 }}{{ end }}{{ slice $d 9 10 }}',
    "%-m": '{{ if ne (slice $d 5 6) "0" }}{{ slice $d 5 6 }}{{ end }}{{ slice $d 6 7 }}',
    "%%": "%",
}
_DIRECTIVE = re.compile(r"%-?[a-zA-Z%]")
_MARK = re.compile(r"Qdate(\d+)Q")


@dataclass(slots=True)
class DateMarks:
    """Stands in for ``strftime_now``: writes marks, and remembers the formats asked for."""

    formats: list[str] = field(default_factory=list)

    def __call__(self, form: str) -> str:
        if form not in self.formats:
            self.formats.append(form)
        return f"Qdate{self.formats.index(form)}Q"

    def inexpressible(self) -> tuple[str, ...]:
        """Return the formats that a Go template cannot write."""
        return tuple(f for f in self.formats if _actions(f) is None)

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Cut a text at its marks: (text or Go actions, whether it is actions)."""
        out: list[tuple[str, bool]] = []
        for k, piece in enumerate(_MARK.split(text)):
            if k % 2 == 0:
                out.append((piece, False))
                continue
            form = self.formats[int(piece)]
            actions = _actions(form)
            if actions is None:
                raise ValueError(form)
            out.append((actions, True))
        return out

    def preamble(self) -> str:
        """Return the Go actions that set the variables which the marks' actions use."""
        if not self.formats:
            return ""
        used = "".join(self.formats)
        out = "{{ $d := currentDate }}"
        for directive, variable, length in (("%B", "$month", None), ("%b", "$mon", 3)):
            if directive not in used:
                continue
            out += f'{{{{ {variable} := "" }}}}'
            for number, name in enumerate(_MONTHS, 1):
                word = "if" if number == 1 else "else if"
                out += f'{{{{ {word} eq (slice $d 5 7) "{number:02d}" }}}}'
                out += f'{{{{ {variable} = "{name[:length]}" }}}}'
            out += "{{ end }}"
        return out


_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip


def _actions(form: str) -> str | None:
    """Return text and Go actions for a format; None for what cannot be written."""
    if form == "%Y-%m-%d":
        return "{{ $d }}"
    out, at = "", 0
    for match in _DIRECTIVE.finditer(form):
        if match.group() not in _DIRECTIVES:
            return None
        out += form[at : match.start()] + _DIRECTIVES[match.group()]
        at = match.end()
    rest = form[at:]
    return None if "{" in form or "%" in rest else out + rest
