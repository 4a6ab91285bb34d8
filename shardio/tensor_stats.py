"""Statistics of a tensor, read slab by slab: extremes, mean, deviation, zeros, NaN, a histogram.

Mean and deviation of the finite values are joined slab by slab in float64, as Chan, Golub and
LeVeque (1979) do. The histogram takes a second pass, because its range is known after the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np

from . import dtypes
from .box import extent
from .payload import row_slabs
from .tensor import LazyTensor

_SLAB = 1 << 20  # elements in memory at once
_BINS = 24
_REACH = 4.0  # standard deviations on each side of the mean that the bins span
_EXPONENTS = {dtypes.FLOAT16: 0x7C00, dtypes.BFLOAT16: 0x7F80}


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges (one more edge than counts), and what lies outside them."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    above: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Values of a tensor.

    Attributes:
        size: elements.
        nan, inf, zeros: how many there are (inf: of either sign).
        min, max, mean, std: of the finite values (None without any); std of the population.
        histogram: of the finite values, None for empty tensors.
    """

    size: int
    nan: int
    inf: int
    zeros: int
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    histogram: Histogram | None


def tensor_stats(tensor: LazyTensor, tick: Callable[[int], None] | None = None) -> Stats:
    """Return the statistics of a tensor of real numbers (complex ones by magnitude).

    Args:
        tensor: any; it is read twice.
        tick: called with the bytes of each slab read.

    Raises:
        FormatError: a file is short or unreadable.
    """
    nan = inf = zeros = count = 0
    low, high, mean, moment = np.inf, -np.inf, 0.0, 0.0
    for values in _slabs(tensor, tick):
        finite = np.isfinite(values)
        if not finite.all():
            missing = int(np.count_nonzero(np.isnan(values)))
            nan += missing
            values = values[finite]
            inf += int(finite.size - values.size - missing)
        if not values.size:
            continue
        zeros += int(np.count_nonzero(values == 0))
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        part = float(values.mean())
        spread = float(np.square(values - part).sum())
        shift = part - mean
        both = count + values.size
        moment += spread + shift * shift * count * values.size / both
        mean += shift * values.size / both
        count = both
    if not count:
        return Stats(tensor.size, nan, inf, zeros, None, None, None, None, None)
    std = sqrt(moment / count)
    shown = _histogram(tensor, low, high, mean, std, tick)
    return Stats(tensor.size, nan, inf, zeros, low, high, mean, std, shown)


def _histogram(
    tensor: LazyTensor,
    low: float,
    high: float,
    mean: float,
    std: float,
    tick: Callable[[int], None] | None,
) -> Histogram:
    first, last = max(low, mean - _REACH * std), min(high, mean + _REACH * std)
    if not first < last:
        first, last = low, max(high, np.nextafter(low, np.inf))
    edges = np.linspace(first, last, _BINS + 1)
    counts = np.zeros(_BINS, np.int64)
    below = above = 0
    for values in _slabs(tensor, tick):
        finite = values[np.isfinite(values)]
        counts += np.histogram(finite, edges)[0]
        below += int(np.count_nonzero(finite < edges[0]))
        above += int(np.count_nonzero(finite > edges[-1]))
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()), below, above)


def _slabs(tensor: LazyTensor, tick: Callable[[int], None] | None) -> Iterator[np.ndarray]:
    for box, _ in row_slabs(tensor.shape, _SLAB):
        out = np.empty(extent(box), tensor.dtype)
        tensor.fill(out, box)
        if tick is not None:
            tick(out.nbytes)
        if out.dtype.kind == "c":
            out = np.abs(out)
        yield out.astype(np.float64).reshape(-1)


def count_nonfinite(values: np.ndarray) -> tuple[int, int]:
    """Return the numbers of NaN and of infinite values."""
    if values.dtype.kind in "iub":
        return 0, 0
    mask = _EXPONENTS.get(values.dtype)
    if mask is not None:  # numpy's own test is slow for these
        if not ((values.view(np.uint16) & np.uint16(mask)) == mask).any():
            return 0, 0
    elif values.dtype.kind in "fc" and np.isfinite(values).all():
        return 0, 0
    wide = _wide(values)
    nan = int(np.count_nonzero(np.isnan(wide)))
    return nan, int(np.count_nonzero(~np.isfinite(wide))) - nan


def first_nonfinite(values: np.ndarray) -> tuple[int, ...]:
    """Return the index of the first NaN or infinite value; there must be one."""
    return tuple(int(i) for i in np.argwhere(~np.isfinite(_wide(values)))[0])


def _wide(values: np.ndarray) -> np.ndarray:
    return values if values.dtype.kind in "fc" else values.astype(np.float32)
