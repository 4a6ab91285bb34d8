"""A weight with a low-rank update, computed when it is read: ``W + s * B @ A``, or DoRA's form.

A region is computed from the same rows of ``W`` and ``B`` and columns of ``A`` in float32, as PEFT
does, and rounded once to the type of ``W``; memory stays that of the region. The last bit of a
float32 product depends on how BLAS blocks it, so products are made on a fixed grid of tiles: the
result is the same whatever regions it is read in. Source: PEFT ``tuners/lora/{layer,dora}.py``
(Hu et al. 2021, Liu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .box import Box, extent
from .cast import caster
from .tensor import LazyTensor

_F32 = np.dtype(np.float32)
_TILE = (32, 4096)  # rows and columns of one product


class LowRank(LazyTensor):
    """``base + scale * b @ a``, its rows rescaled to ``magnitude`` if there is one.

    Args:
        base: [rows, columns].
        a: [rank, columns].
        b: [rows, rank].
        scale: factor of the update.
        magnitude: DoRA's length of each row [rows], or None.
    """

    __slots__ = ("_a", "_b", "_base", "_magnitude", "_norms", "_scale")

    def __init__(
        self,
        base: LazyTensor,
        a: LazyTensor,
        b: LazyTensor,
        scale: float,
        magnitude: LazyTensor | None = None,
    ) -> None:
        super().__init__(base.shape, base.dtype)
        assert base.ndim == 2, "checked by the caller"
        assert b.shape == (base.shape[0], a.shape[0]), "checked by the caller"
        assert a.shape[1] == base.shape[1], "checked by the caller"
        self._base, self._a, self._b = base.cast(_F32), a.cast(_F32), b.cast(_F32)
        self._scale = np.float32(scale)
        self._magnitude = None if magnitude is None else magnitude.cast(_F32)
        self._norms: np.ndarray | None = None

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Compute a region, a row of tiles at a time."""
        (top, left), (bottom, right) = box
        whole = (left, right) == (0, self.shape[1])
        for lo, hi in _steps(top, bottom, _TILE[0]):
            value = self._sum(lo, hi, left, right)
            if self._magnitude is not None:
                norms = _lengths(value) if whole else self._all_norms()[lo:hi]
                factor = self._magnitude.read([slice(lo, hi)]) / norms
                value *= factor[:, None]
            out[lo - top : hi - top] = _rounded(value, self.dtype)

    def _sum(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """The updated weight in float32, without rescaling; the rows are within one tile."""
        rows, columns = self.shape
        first = top - top % _TILE[0]
        b = self._b.read([slice(first, min(first + _TILE[0], rows))])
        value = np.empty((bottom - top, right - left), _F32)
        for lo, hi in _steps(left, right, _TILE[1]):
            start = lo - lo % _TILE[1]
            a = self._a.read([slice(None), slice(start, min(start + _TILE[1], columns))])
            product = b @ a
            value[:, lo - left : hi - left] = product[
                top - first : bottom - first, lo - start : hi - start
            ]
        value *= self._scale
        value += self._base.read([slice(top, bottom), slice(left, right)])
        return value

    def _all_norms(self) -> np.ndarray:
        """The lengths of all rows, kept: only needed where regions do not have whole rows.

        Two threads may both compute them; they get equal ones.
        """
        if self._norms is None:
            rows, columns = self.shape
            steps = _steps(0, rows, _TILE[0])
            parts = [_lengths(self._sum(lo, hi, 0, columns)) for lo, hi in steps]
            self._norms = np.concatenate(parts)
        return self._norms

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The file pieces of all operands."""
        for part in self._operands():
            yield from part.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The leaves of all operands."""
        for part in self._operands():
            yield from part.leaves()

    def _operands(self) -> Iterator[LazyTensor]:
        yield from (self._base, self._a, self._b)
        if self._magnitude is not None:
            yield self._magnitude


class Sum(LazyTensor):
    """``base + scale * update`` of two tensors of one shape, rounded once (the bias of a LoRA)."""

    __slots__ = ("_base", "_scale", "_update")

    def __init__(self, base: LazyTensor, update: LazyTensor, scale: float) -> None:
        super().__init__(base.shape, base.dtype)
        assert base.shape == update.shape, "checked by the caller"
        self._base, self._update = base.cast(_F32), update.cast(_F32)
        self._scale = np.float32(scale)

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Compute a region."""
        value, other = np.empty(extent(box), _F32), np.empty(extent(box), _F32)
        self._update.fill(value, box)
        self._base.fill(other, box)
        out[...] = _rounded(value * self._scale + other, self.dtype)

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The file pieces of both."""
        yield from self._base.spans()
        yield from self._update.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The leaves of both."""
        yield from self._base.leaves()
        yield from self._update.leaves()


def _steps(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of ``step``."""
    while start < stop:
        end = min(start - start % step + step, stop)
        yield start, end
        start = end


def _lengths(rows: np.ndarray) -> np.ndarray:
    """L2 norm of each row, summed in float64."""
    wide = rows.astype(np.float64)
    return np.sqrt(np.einsum("ij,ij->i", wide, wide)).astype(_F32)


def _rounded(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return value if dtype == _F32 else caster(_F32, dtype)(value)
