"""Comparing tensors without holding them:

slab by slab, exactly or by the size of the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..errors import FormatError
from .box import Box, extent
from .payload import row_slabs
from .tensor import LazyTensor

T = TypeVar("T")
R = TypeVar("R")

_SLAB = 4 << 20  # elements are compared in slabs of about this many bytes


@dataclass(frozen=True, slots=True)
class Difference:
    """How two tensors of one shape differ.

    Attributes:
        name: the tensor.
        different: elements that are not equal (NaN equals NaN).
        size: elements in all.
        max_abs: largest absolute difference (inf where one side is not finite).
        max_rel: largest absolute difference over the largest magnitude of the left tensor.
    """

    name: str
    different: int
    size: int
    max_abs: float
    max_rel: float

    @property
    def equal(self) -> bool:
        """Whether every element is the same."""
        return self.different == 0


def compare(name: str, a: LazyTensor, b: LazyTensor) -> Difference:
    """Compare two tensors of equal shape element by element; dtypes may differ.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"{name}: shapes {a.shape} and {b.shape} differ")
    different, max_abs, largest = 0, 0.0, 0.0
    for x, y in _slabs(a, b):
        if a.dtype == b.dtype and _same_bytes(x, y):
            largest = max(largest, _magnitude(x))
            continue
        left, right = _wide(x), _wide(y)
        unequal = (left != right) & ~(np.isnan(left) & np.isnan(right))
        count = int(np.count_nonzero(unequal))
        largest = max(largest, _magnitude(x))
        if count:
            different += count
            with np.errstate(invalid="ignore", over="ignore"):
                gap = np.abs(left[unequal] - right[unequal])
            max_abs = max(max_abs, float(np.max(np.where(np.isnan(gap), np.inf, gap))))
    return Difference(name, different, a.size, max_abs, max_abs / largest if largest else max_abs)


def same(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors hold the same bytes (shape, dtype and every bit);

    stops at the first difference.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(_same_bytes(x, y) for x, y in _slabs(a, b))


def check_replicas(
    weights: Mapping[str, LazyTensor], replicas: Mapping[str, Sequence[LazyTensor]]
) -> None:
    """Compare every stored copy of a tensor with the one that is used.

    Raises:
        FormatError: naming the tensor and the two files that disagree.
    """

    def check(item: tuple[str, LazyTensor]) -> str | None:
        name, copy = item
        if same(weights[name], copy):
            return None
        here, there = (next((str(p) for p, _, _ in t.spans()), "?") for t in (weights[name], copy))
        return (
            f"{name}: the copy in {there} differs from the one in {here}; the ranks do not belong "
            "to one save, or training diverged (compare with --no-verify-replicas)"
        )

    jobs = [(n, c) for n, copies in replicas.items() if n in weights for c in copies]
    for problem in in_parallel(check, jobs):
        if problem:
            raise FormatError(problem)


def in_parallel(fn: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Map over items with a few threads, results in order."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from pool.map(fn, items)


def _slabs(a: LazyTensor, b: LazyTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    limit = max(1, _SLAB // max(a.dtype.itemsize, b.dtype.itemsize))
    for box, _ in row_slabs(a.shape, limit):
        yield _fill(a, box), _fill(b, box)


def _fill(t: LazyTensor, box: Box) -> np.ndarray:
    out = np.empty(extent(box), t.dtype)
    t.fill(out, box)
    return out


def _same_bytes(x: np.ndarray, y: np.ndarray) -> bool:
    return bool(np.array_equal(x.reshape(-1).view(np.uint8), y.reshape(-1).view(np.uint8)))


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def _magnitude(x: np.ndarray) -> float:
    values = np.abs(_wide(x))
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else 0.0
