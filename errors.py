"""The errors a user can meet. Everything else that escapes is a bug of ours.

The command line turns an ``MconvError`` into one line and exit code 2. A message says what is
wrong, where (file, then tensor or key), what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MconvError(Exception):
    """Base of all user errors: bad input, impossible requests, missing files."""


class FormatError(MconvError):
    """A file is not what its format demands: truncated, lying, hostile or incomplete."""


class LayoutError(MconvError):
    """Shards do not fit together, or a parallel layout cannot hold this model."""


class UnsupportedError(MconvError):
    """Valid input of a kind that mconv does not handle (yet)."""


class ConfigError(MconvError):
    """An option, or a model configuration, is missing or contradicts the data."""


class QuantError(MconvError):
    """A tensor cannot be quantized as asked (shape, NaN, missing importance matrix)."""


class TrainError(MconvError):
    """A training process failed."""


class OutputError(MconvError):
    """The output cannot be written: it exists, the disk is full, the path is wrong."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with what it counts: ``1 tensor``, ``2,000 tensors``.

    Args:
        number: how many.
        one: what follows 1; a verb may belong to it: ``tensor is``.
        many: what follows other numbers, if it is not ``one`` with an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
