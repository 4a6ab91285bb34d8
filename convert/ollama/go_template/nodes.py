"""The tree of a Go template: what the parser builds and the executor walks.

Source: the grammar of Go's ``text/template``. Every node remembers its line for messages.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dot:
    """``.``"""


@dataclass(frozen=True, slots=True)
class Nil:
    """``nil``"""


@dataclass(frozen=True, slots=True)
class Constant:
    """A string, number or truth value."""

    value: str | int | float | bool


@dataclass(frozen=True, slots=True)
class Field:
    """``.A.B``"""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """``$x.A.B``; ``$`` alone is the data."""

    name: str
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chain:
    """``(pipeline).A.B``"""

    inner: Operand
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Function:
    """A function's name."""

    name: str


@dataclass(frozen=True, slots=True)
class Command:
    """Words of a pipeline between two bars; the first may be a function."""

    words: tuple[Operand, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Commands, and the variables that take their value (``assign``: existing ones)."""

    commands: tuple[Command, ...]
    variables: tuple[str, ...] = ()
    assign: bool = False


Operand = Dot | Nil | Constant | Field | Variable | Chain | Function | Pipeline


@dataclass(frozen=True, slots=True)
class Text:
    """Text as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Action:
    """``{{ pipeline }}``"""

    pipeline: Pipeline
    line: int


@dataclass(frozen=True, slots=True)
class Branch:
    """``{{ if }}``, ``{{ with }}`` or ``{{ range }}`` with its ``{{ else }}``."""

    kind: str
    pipeline: Pipeline
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Call:
    """``{{ template "name" pipeline }}``"""

    name: str
    pipeline: Pipeline | None
    line: int


@dataclass(frozen=True, slots=True)
class Jump:
    """``{{ break }}`` or ``{{ continue }}``"""

    kind: str


Node = Text | Action | Branch | Call | Jump
