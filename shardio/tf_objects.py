"""The object graph of a TensorFlow 2 checkpoint: under which paths a variable can be reached.

Each variable is stored under one key only, which with Keras optimizers is often the optimizer's
(``optimizer/_trainable_variables/3``); the graph tells the model's own path. Source: TensorFlow
``trackable_object_graph.proto``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .protobuf import fields, first, text

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_MAX_PATHS = 2_000_000

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """One stored variable: its key, all paths to it (shortest first), TensorFlow's own name."""

    key: str
    paths: tuple[Path, ...]
    full_name: str


def variables(graph: bytes) -> list[Variable]:
    """Return the variables of a serialized graph.

    Raises:
        ValueError: malformed data.
    """
    nodes = [fields(n) for n in fields(graph).get(1, []) if isinstance(n, bytes)]
    children = []
    for node in nodes:
        edges = [fields(c) for c in node.get(1, []) if isinstance(c, bytes)]
        children.append([(text(e, 2), first(e, 1, 0)) for e in edges])
    paths = _paths(children)
    found = []
    for number, node in enumerate(nodes):
        for raw in node.get(2, []):
            attribute = fields(raw) if isinstance(raw, bytes) else {}
            key = text(attribute, 3)
            if key:
                found.append(Variable(key, tuple(paths[number]), text(attribute, 2)))
    return found


def _paths(children: list[list[tuple[str, int]]]) -> list[list[Path]]:
    """Paths from the root to each node, without going twice through one node; shortest first."""
    paths: list[list[Path]] = [[] for _ in children]
    pending: deque[tuple[int, Path, frozenset[int]]] = deque([(0, (), frozenset([0]))])
    count = 0
    while pending and count < _MAX_PATHS:
        number, path, seen = pending.popleft()
        count += 1
        paths[number].append(path)
        if len(paths[number]) > 16:  # enough to choose from
            continue
        for name, child in children[number]:
            if not 0 <= child < len(children):
                raise ValueError(f"node {child} of {len(children)}")
            if child not in seen:
                pending.append((child, (*path, name), seen | {child}))
    return paths
