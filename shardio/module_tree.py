"""The tensors of a checkpoint as a tree of modules; equal neighbours are shown once.

``layers.0`` to ``layers.31`` with the same contents become one ``layers.0..31``, so that a model
of 61 layers with 256 experts fits a screen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .report import TensorLine

_NUMBERED = re.compile(r"^(.*?)(\d{1,9})$")
_DEPTH = 60  # dots of a name that are levels


@dataclass(frozen=True, slots=True)
class Module:
    """A node of the tree.

    Attributes:
        name: last part of the dotted name; ``0..31`` for equal neighbours.
        count: how many it stands for.
        parameters: elements below it, over all it stands for.
        nbytes: bytes below it.
        tensor: its own line when it is a tensor (of the first one).
        children: what is below it, in the order of the checkpoint.
    """

    name: str
    count: int
    parameters: int
    nbytes: int
    tensor: TensorLine | None
    children: tuple[Module, ...]


class _Node:
    """A module while the tree grows."""

    __slots__ = ("children", "line")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.line: TensorLine | None = None


def module_tree(lines: Iterable[TensorLine], name: str = "") -> Module:
    """Return the root of the tree of all tensors."""
    root = _Node()
    for line in lines:
        node = root
        for part in line.name.split(".", _DEPTH):
            node = node.children.setdefault(part, _Node())
        node.line = line
    return _build(name, root, {})[0]


def _build(name: str, node: _Node, kinds: dict[object, int]) -> tuple[Module, int]:
    """Return the module and the number of its kind: equal ones have equal names, shapes and types
    below them.
    """
    below = _merged([_build(part, child, kinds) for part, child in node.children.items()])
    line = node.line
    own = (line.shape, line.dtype) if line else None
    kind = kinds.setdefault((own, tuple((m.name, k) for m, k in below)), len(kinds))
    children = tuple(m for m, _ in below)
    parameters = sum(c.parameters for c in children) + (line.size if line else 0)
    nbytes = sum(c.nbytes for c in children) + (line.nbytes if line else 0)
    return Module(name, 1, parameters, nbytes, line, children), kind


def _merged(modules: list[tuple[Module, int]]) -> list[tuple[Module, int]]:
    """Join neighbours of one kind whose names end with rising numbers."""
    out: list[tuple[Module, int]] = []
    prefix, first = "", -1  # of the last entry
    for module, kind in modules:
        match = _NUMBERED.match(module.name)
        if match and out and out[-1][1] == kind and match[1] == prefix:
            last = out[-1][0]
            if first >= 0 and int(match[2]) == first + last.count:
                out[-1] = _joined(last, module, f"{prefix}{first}..{match[2]}"), kind
                continue
        prefix, first = (match[1], int(match[2])) if match else (module.name, -1)
        out.append((module, kind))
    return out


def _joined(last: Module, more: Module, name: str) -> Module:
    return Module(
        name,
        last.count + 1,
        last.parameters + more.parameters,
        last.nbytes + more.nbytes,
        last.tensor,
        last.children,
    )
