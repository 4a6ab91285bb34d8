"""Do the fp32 masters and the weights of a checkpoint belong together?

Mixed-precision training keeps fp32 masters and hands the model their rounded values after every
step, so in a sound checkpoint ``master.to(dtype) == weight`` bit for bit. Rank files that were
swapped, parameters read in the wrong order, and masters and weights of two different steps all
break it. A few rows per tensor are enough to see that; reading everything proves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from . import dtypes
from .box import Box, extent, normalize
from .checkpoint import Checkpoint
from .coverage import Flaw
from .payload import row_slabs
from .tensor import LazyTensor

_SLAB = 1 << 20  # elements in memory at once, per thread
_THREADS = 4
_RUN = 256  # elements of a vector that are sampled together


def check_master_agreement(ckpt: Checkpoint, *, sample: int | None) -> list[Flaw]:
    """Compare each fp32 master, rounded to the weight's dtype, with the weight.

    Args:
        ckpt: the checkpoint; without masters, or where the masters are the weights (ZeRO-3), there
            is nothing to compare and the list is empty.
        sample: rows per tensor, spread evenly; None compares every element.

    Returns:
        One flaw for each tensor that disagrees, in the order of the weights. Memory is bounded by a
        few slabs of 4 MiB per thread.

    Raises:
        FormatError: a file is short or unreadable.
    """
    masters = ckpt.optimizer.get("master", {})
    pairs = [
        (name, masters[name], weight)
        for name, weight in ckpt.weights.items()
        if name in masters and masters[name] is not weight and dtypes.is_float(weight.dtype)
    ]

    def check(pair: tuple[str, LazyTensor, LazyTensor]) -> Flaw | None:
        name, master, weight = pair
        problem = _problem(master, weight, sample)
        return Flaw(name, problem) if problem else None

    with ThreadPoolExecutor(_THREADS) as pool:
        return [flaw for flaw in pool.map(check, pairs) if flaw is not None]


def _problem(master: LazyTensor, weight: LazyTensor, sample: int | None) -> str | None:
    if master.shape != weight.shape:
        return f"the fp32 master has shape {master.shape}, the weight {weight.shape}"
    rounded = master.cast(weight.dtype)
    different = seen = 0
    first: tuple[int, ...] | None = None
    for box in _boxes(weight.shape, sample):
        region = tuple(slice(a, b) for a, b in zip(*box, strict=True))
        a, b = rounded.read(region), weight.read(region)
        bad = differing(a, b)
        count = int(np.count_nonzero(bad))
        seen += bad.size
        different += count
        if count and first is None:
            at = np.argwhere(bad)[0]
            first = tuple(int(i) + lo for i, lo in zip(at, box[0], strict=True))
    if first is None:
        return None
    return disagreement(different, seen, first, weight.dtype)


def differing(rounded: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return where two arrays of one dtype differ (booleans); NaN equals NaN."""
    with np.errstate(invalid="ignore"):
        bad: np.ndarray = (rounded != weights) & ~((rounded != rounded) & (weights != weights))
    return bad


def disagreement(different: int, seen: int, first: tuple[int, ...], dtype: np.dtype) -> str:
    """Say in words how many of the compared elements are not the rounded masters."""
    return (
        f"{different} of {seen} compared elements differ from their fp32 master rounded to "
        f"{dtypes.name(dtype)}, first at {list(first)}: rank files are swapped, or "
        "weights and optimizer are of different steps"
    )


def _boxes(shape: tuple[int, ...], sample: int | None) -> Iterator[Box]:
    """Boxes that tile the tensor, or ``sample`` of its rows (runs of a vector) spread evenly."""
    if not shape or sample is None or shape[0] <= sample:
        for box, _ in row_slabs(shape, _SLAB):
            yield box
        return
    width = _RUN if len(shape) == 1 else 1
    places = max(1, min(sample, shape[0] // width))
    for at in np.linspace(0, shape[0] - min(width, shape[0]), places).astype(int).tolist():
        row = normalize((slice(at, at + width),), shape)
        for (lo, hi), _ in row_slabs(extent(row), _SLAB):
            yield (
                tuple(a + b for a, b in zip(lo, row[0], strict=True)),
                tuple(a + b for a, b in zip(hi, row[0], strict=True)),
            )
