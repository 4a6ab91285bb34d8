"""Parameter-name patterns from a checkpoint: regular expressions, used with ``re.match``.

A checkpoint is untrusted, and Python's regular expressions can be made to run for ever, so
patterns with quantified groups, back references or many repeats are refused. AutoTP writes one
anchored literal per parameter; those are looked up instead of searched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Generic, TypeVar

from ...errors import FormatError

T = TypeVar("T")
_MAX_PATTERN = 512
_MAX_REPEATS = 4
_SLOW = re.compile(r"\)[*+{]|\\[1-9]|\(\?[P<=!(]")  # quantified groups, back references
_LITERAL = re.compile(r"^\^((?:[\w-]|\\[.\-_])+)\$$")


class Patterns(Generic[T]):
    """Values by name pattern; the first match wins."""

    __slots__ = ("_exact", "_general")

    def __init__(self, pairs: Iterable[tuple[object, T]], source: str) -> None:
        """Compile the patterns.

        Raises:
            FormatError: no regular expression, or one that could be slow.
        """
        self._exact: dict[str, T] = {}
        self._general: list[tuple[re.Pattern[str], T]] = []
        for pattern, value in pairs:
            text = pattern if isinstance(pattern, str) else ""
            if literal := _LITERAL.match(text):
                self._exact.setdefault(literal[1].replace("\\", ""), value)
            else:
                self._general.append((_compile(text, source), value))

    def get(self, name: str) -> T | None:
        """Return the value of the first pattern that matches the start of ``name``, or None."""
        found = self._exact.get(name)
        if found is not None:
            return found
        return next((v for p, v in self._general if p.match(name)), None)

    def __contains__(self, name: str) -> bool:
        return name in self._exact or any(p.match(name) for p, _ in self._general)


def _compile(text: str, source: str) -> re.Pattern[str]:
    repeats = sum(text.count(c) for c in "*+") - text.count("\\*") - text.count("\\+")
    if not text or len(text) > _MAX_PATTERN or _SLOW.search(text) or repeats > _MAX_REPEATS:
        raise FormatError(
            f"{source}: universal_checkpoint_info has a name pattern that is empty or could take "
            f"very long to match: {text[:80]!r}"
        )
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as e:
        raise FormatError(f"{source}: {text[:80]!r} is no regular expression ({e})") from None
