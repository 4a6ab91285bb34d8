"""Bound the nesting of an unpickled object, so that no later code can run out of stack.

A pickle can nest a million lists in a megabyte, or make a list its own element. Comparing,
printing or converting such an object recurses once per level. The walk here is iterative and
exact: it takes the longest path through plain containers. A ``Record`` prints and compares flat,
so it starts a new count, and only Records may refer back to what contains them.
"""

from __future__ import annotations

from typing import Any

from .pickle_guard import Guard
from .records import MAX_DEPTH, Record

_NESTED = frozenset((dict, list, tuple, set, frozenset, Record))
_FLAT_MEMO = 8  # containers below this size are cheaper to scan again than to remember
_OPEN = -1


def check_nesting(guard: Guard, root: object) -> None:
    """Refuse plain containers nested deeper than 500 levels or inside themselves.

    Raises:
        FormatError: through ``guard``.
    """
    heights: dict[int, int] = {}  # levels of finished containers; Records count as 0
    roots = [root]
    while roots:
        top = roots.pop()
        heights[id(top)] = 0
        for part in _inner(top) if type(top) is Record else (top,):
            if not _is_flat(part, heights, roots):
                _measure(guard, part, heights, roots)


def _is_flat(part: Any, heights: dict[int, int], roots: list[Any]) -> bool:
    """Whether a small container holds nothing but plain values, tuples of these, and Records (which
    are queued). Most of the millions of containers in large metadata are of this kind.
    """
    if type(part) is tuple:
        return len(part) <= _FLAT_MEMO and not _inner(part)
    if type(part) is not dict or len(part) > _FLAT_MEMO:
        return False
    for value in part.values():
        kind = type(value)
        if kind is Record:
            if id(value) not in heights:
                heights[id(value)] = 0
                roots.append(value)
        elif kind in _NESTED and not (
            kind is tuple and len(value) <= _FLAT_MEMO and not _inner(value)
        ):
            return False
    return not any(type(key) in _NESTED for key in part)


def _measure(guard: Guard, top: Any, heights: dict[int, int], roots: list[Any]) -> None:
    """Compute the height of ``top`` and of everything in it; queue the Records found."""
    stack = [[None, [top], 0]]
    while stack:
        frame: list[Any] = stack[-1]
        if frame[1]:
            child = frame[1].pop()
            height = heights.get(id(child))
            if type(child) is Record:
                if height is None:
                    heights[id(child)] = 0
                    roots.append(child)
            elif height:
                if height == _OPEN:
                    guard.fail("a container contains itself")
                frame[2] = max(frame[2], height)
            elif below := _inner(child):
                if len(stack) > MAX_DEPTH:
                    guard.fail("nested too deeply")
                heights[id(child)] = _OPEN
                stack.append([child, below, 0])
            else:
                frame[2] = frame[2] or 1
                if type(child) in _NESTED and len(child) > _FLAT_MEMO:
                    heights[id(child)] = 1
        else:
            stack.pop()
            height = heights[id(frame[0])] = frame[2] + 1
            if height > MAX_DEPTH:
                guard.fail("nested too deeply")
            if stack:
                stack[-1][2] = max(stack[-1][2], height)


def _inner(node: Any) -> list[Any]:
    """Return the containers and Records directly inside a node."""
    kind = type(node)
    if kind is dict:
        found = [v for v in node.values() if type(v) in _NESTED]
        return found + [k for k in node if type(k) in _NESTED]
    if kind is Record:
        parts = (node.args, node.state, node.kwargs, node.items, node.mapping)
        return [p for p in parts if p and type(p) in _NESTED]
    return [v for v in node if type(v) in _NESTED] if kind in _NESTED else []
