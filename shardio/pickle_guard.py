"""Limits that keep a hostile pickle from costing more than its size justifies.

A pickle is a program. Its instructions can repeat work (copy a big list a thousand times, hash a
tuple that contains itself twice at each of sixty levels); the guard charges such work to a budget
proportional to the file size, and checks dictionary keys before Python hashes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import numpy as np

from ..errors import FormatError
from .records import Global, Record, StoredTensor

_KEY_NODES = 1024  # a tuple used as key: this many nodes, hence at most this deep
_KEY_COLLISIONS = 64  # equal hashes within one dict or set
_FREE_KEYS = frozenset((str, bytes, bool, float, type(None), Record, Global, StoredTensor))
_COUNTED_KEYS = frozenset((int, complex, frozenset, range))
_NUMPY_KEYS = (np.generic, np.dtype)


def brief(value: object) -> str:
    """Describe a value from a pickle for a message: short, and without walking into it."""
    if type(value) in (str, bytes):
        return repr(value[:80])  # type: ignore[index]  # str or bytes, narrowed by the line above
    if type(value) in (bool, type(None), float):
        return repr(value)
    if type(value) is int:
        return repr(value) if abs(value) < 2**64 else f"a {value.bit_length()}-bit integer"
    if type(value) in (Record, Global):
        return repr(value)
    return f"a {type(value).__name__}"


class TruncatedPickle(FormatError):  # noqa: N818  # a FormatError that readers of streams catch
    """The data ended before the pickle did."""


class Guard:
    """Budget and key checks of one unpickling."""

    def __init__(self, where: str, size: int) -> None:
        self.where = where
        self.budget = 8 * size + 1_000_000
        self._collisions: dict[tuple[int, int], int] = {}

    def fail(self, problem: str) -> NoReturn:
        """Raise the FormatError of this file."""
        raise FormatError(f"{self.where}: malformed pickle: {problem}")

    def truncated(self, problem: str) -> NoReturn:
        """Raise the error of a pickle that ends too early."""
        raise TruncatedPickle(f"{self.where}: malformed pickle: truncated: {problem}")

    def spend(self, amount: int) -> None:
        """Charge work or memory that the file did not pay for with its own bytes."""
        self.budget -= amount
        if self.budget < 0:
            self.fail("it expands to far more than its own size")

    def check_keys(self, keys: Iterable[object], owner: object) -> None:
        """Refuse keys that are unhashable, or whose hashing would be expensive or collide.

        ``owner`` is the dict or set that will hold them.
        """
        for key in keys:
            kind = type(key)
            if kind in _FREE_KEYS or (kind is int and -(2**60) < key < 2**60):  # type: ignore[operator]  # int
                continue
            if kind is tuple:
                self._check_tuple(key)
            elif kind not in _COUNTED_KEYS and not isinstance(key, _NUMPY_KEYS):
                self.fail(f"{brief(key)} is used as a dictionary key")
            slot = (id(owner), hash(key))
            count = self._collisions[slot] = self._collisions.get(slot, 0) + 1
            if count > _KEY_COLLISIONS:
                self.fail("its dictionary keys are built to collide")

    def _check_tuple(self, key: object) -> None:
        pending, nodes = [key], 0
        while pending:
            node = pending.pop()
            kind = type(node)
            if kind is tuple:
                nodes += 1 + len(node)  # type: ignore[arg-type]  # a tuple
                if nodes > _KEY_NODES:
                    self.fail("a tuple used as dictionary key is too large or too deep")
                pending.extend(node)  # type: ignore[arg-type]  # a tuple
            elif not (kind in _FREE_KEYS or kind in _COUNTED_KEYS or isinstance(node, _NUMPY_KEYS)):
                self.fail(f"{brief(node)} is used within a dictionary key")
        self.spend(nodes)
