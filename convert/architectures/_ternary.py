"""Weights of BitNet as the model uses them: -1, 0 or 1 times the mean magnitude of the matrix.

The mean needs the whole matrix; it is read in pieces when the first value is asked for. Source of
the formula: BitNet b1.58 (arXiv 2402.17764), absmean quantization.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Lock

import numpy as np

from ...shardio.box import Box, extent
from ...shardio.dequant import Coded
from ...shardio.tensor import LazyTensor

_PIECE = 1 << 20  # elements
_SMALLEST = np.float32(1e-5)


class Ternary(LazyTensor):
    """``round(clip(w / mean)) * mean`` of a float32 or float16 matrix."""

    __slots__ = ("_base", "_lock", "_scale")

    def __init__(self, base: LazyTensor) -> None:
        super().__init__(base.shape, base.dtype)
        self._base = base
        self._scale: np.float32 | None = None
        self._lock = Lock()

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Compute a region."""
        data = np.empty(extent(box), self.dtype)
        self._base.fill(data, box)
        inverse = np.float32(1) / self._mean()
        units = np.rint(data.astype(np.float32) * inverse).clip(-1, 1)
        out[...] = (units / inverse).astype(self.dtype)

    def _mean(self) -> np.float32:
        with self._lock:
            if self._scale is None:
                self._scale = max(np.float32(self._sum() / self.size), _SMALLEST)
            return self._scale

    def _sum(self) -> float:
        rows = max(1, _PIECE * self.shape[0] // max(1, self.size))
        total = 0.0
        for first in range(0, self.shape[0], rows):
            part = self._base.read([slice(first, min(first + rows, self.shape[0]))])
            total += float(np.abs(part.astype(np.float64)).sum())
        return total

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The base's file pieces."""
        return self._base.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The base's leaves."""
        return self._base.leaves()


def ternary(tensor: LazyTensor) -> LazyTensor:
    """Return the weights as used, in half precision where they are, else in float32.

    Weights that are stored in three values already stay: zeros would lower their mean magnitude.
    """
    if isinstance(tensor, Coded):
        return tensor
    half = np.dtype(np.float16)
    return Ternary(tensor.cast(half if tensor.dtype == half else np.dtype(np.float32)))
