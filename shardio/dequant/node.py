"""The common part of all lazily dequantized weights: regions, alignment, rounding once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..box import Box
from ..cast import caster
from ..tensor import LazyTensor

F32 = np.dtype(np.float32)
_BATCH = 1 << 18  # elements decoded at once


class Decoded(LazyTensor):
    """A matrix decoded from packed parts when it is read.

    Args:
        shape: [rows, columns] of the decoded matrix.
        dtype: that it is rounded to.
        parts: what it is made of.
        unit: rows and columns that are packed together; regions are decoded in multiples of it.
    """

    __slots__ = ("_parts", "_unit")

    def __init__(
        self,
        shape: Sequence[int],
        dtype: np.dtype,
        parts: Sequence[LazyTensor],
        unit: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__(shape, dtype)
        self._parts = tuple(parts)
        self._unit = unit

    @abstractmethod
    def decode(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Return a region in float32; all four are multiples of the unit (or the end)."""

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Decode the units that a region touches, a batch of rows at a time."""
        (top, left), (bottom, right) = box
        height, width = self._unit
        first, last = left - left % width, min(-(-right // width) * width, self.shape[1])
        step = max(1, _BATCH // max((last - first) * height, 1)) * height
        at = top
        while at < bottom:
            lo = at - at % height
            hi = min(lo + step, self.shape[0])
            end = min(hi, bottom)
            with np.errstate(over="ignore", invalid="ignore"):  # damaged scales: they stay inf, NaN
                value = self.decode(lo, hi, first, last)
            value = value[at - lo : end - lo, left - first : right - first]
            rounded = value if self.dtype == F32 else caster(F32, self.dtype)(value)
            out[at - top : end - top] = rounded
            at = end

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The file pieces of all parts."""
        for part in self._parts:
            yield from part.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The leaves of all parts."""
        for part in self._parts:
            yield from part.leaves()


def rows_of(tensor: LazyTensor, top: int, bottom: int) -> np.ndarray:
    """Read rows as they are."""
    return tensor.read([slice(top, bottom)])


def region(tensor: LazyTensor, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """Read a region as it is."""
    return tensor.read([slice(top, bottom), slice(left, right)])
