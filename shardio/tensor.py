"""Lazy tensors: a shape, a dtype and ``read(region)``. Nothing is read until a region is asked for.

Pure movement (slice, permute, reshape, concat, stack) on file-backed tensors is done at once on
their chunk lists (``chunked.py``), so TP, PP, EP, ZeRO and any product of them end as the same
thing: file ranges. What cannot stay a chunk list (values that change, reshapes that would shatter
into rows) becomes a small expression node (``nodes.py``) that reads just the matching regions of
its children.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np

from .box import Box, Index, Region, extent, normalize

Elementwise = Callable[[np.ndarray], np.ndarray]


class LazyTensor(ABC):
    """An n-dimensional array that is somewhere else. Immutable; safe to share between threads."""

    __slots__ = ("dtype", "shape")

    shape: Index
    dtype: np.dtype

    def __init__(self, shape: Sequence[int], dtype: np.dtype) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)

    # -- what a node must say -------------------------------------------------

    @abstractmethod
    def fill(self, out: np.ndarray, box: Box) -> None:
        """Write the elements of ``box`` into ``out`` (the box shape, this dtype, any strides)."""

    @abstractmethod
    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """Yield (file, first byte, end byte) of everything this tensor is made of."""

    def files(self) -> tuple[Path, ...]:
        """Return the file of each piece (one may come several times)."""
        leaves = list(self.leaves())
        if len(leaves) == 1:
            (leaf,) = leaves
            return tuple(p for p, _, _ in self.spans()) if leaf is self else leaf.files()
        return tuple(path for leaf in leaves for path in leaf.files())

    def leaves(self) -> Iterator[LazyTensor]:
        """Yield the tensors under this expression that are not made of others."""
        yield self

    # -- reading --------------------------------------------------------------

    def read(self, region: Region = None) -> np.ndarray:
        """Return a fresh C-contiguous array of ``region`` (slices or ints; ints keep their dim as
        size 1).

        Raises:
            FormatError: a file is short or unreadable.
            IndexError: the region does not fit the shape.
        """
        box = normalize(region, self.shape)
        out = np.empty(extent(box), self.dtype)
        if out.size:
            self.fill(out, box)
        return out

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements in this dtype."""
        return self.size * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"

    # -- movement: overridden where it can be done on byte ranges --------------

    def slice(self, region: Region) -> LazyTensor:
        """Return the lazy sub-tensor of ``region`` (ints keep their dim as size 1)."""
        from .nodes import Slice

        box = normalize(region, self.shape)
        if box == ((0,) * self.ndim, self.shape):
            return self
        return Slice(self, box)

    def permute(self, axes: Sequence[int]) -> LazyTensor:
        """Return the tensor with dims reordered as ``numpy.transpose(axes)`` does."""
        from .nodes import Permute

        order = tuple(axes)
        if order == tuple(range(self.ndim)):
            return self
        return Permute(self, order)

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """Return the row-major reshape; one size may be -1.

        Raises:
            ValueError: the element counts differ.
        """
        from .nodes import Reshape

        target = resolve_shape(self.shape, shape)
        return self if target == self.shape else Reshape(self, target)

    def map(self, fn: Elementwise, dtype: np.dtype | None = None) -> LazyTensor:
        """Return ``fn`` applied to the values.

        ``fn`` must be elementwise: result i depends on input i alone.
        """
        from .nodes import Map

        return Map(self, fn, self.dtype if dtype is None else dtype)

    def cast(self, dtype: np.dtype) -> LazyTensor:
        """Return the tensor converted to ``dtype`` (round to nearest even)."""
        from .cast import caster

        dtype = np.dtype(dtype)
        return self if dtype == self.dtype else self.map(caster(self.dtype, dtype), dtype)


def resolve_shape(old: Index, new: Sequence[int]) -> Index:
    """Fill in a -1 and check the element count. Raises ValueError when they cannot match."""
    size = prod(old)
    target = [int(n) for n in new]
    if target.count(-1) == 1:
        rest = prod(n for n in target if n != -1)
        if rest and size % rest == 0:
            target[target.index(-1)] = size // rest
    if prod(target) != size or any(n < 0 for n in target):
        raise ValueError(f"cannot reshape {tuple(old)} ({size} elements) to {tuple(new)}")
    return tuple(target)


def concat(tensors: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Return the tensors joined along ``axis``; all other dims and the dtype must agree.

    Raises:
        ValueError: nothing to join, or shapes or dtypes that do not fit.
    """
    from .chunked import Chunked, join
    from .nodes import Concat

    if not tensors:
        raise ValueError("concat needs at least one tensor")
    first = tensors[0]
    for t in tensors[1:]:
        if (
            t.ndim != first.ndim
            or t.dtype != first.dtype
            or any(
                a != b
                for k, (a, b) in enumerate(zip(t.shape, first.shape, strict=True))
                if k != axis
            )
        ):
            raise ValueError(
                f"cannot join {t.shape} {t.dtype} to {first.shape} {first.dtype} on dim {axis}"
            )
    if len(tensors) == 1:
        return first
    chunked = [t for t in tensors if isinstance(t, Chunked)]
    if len(chunked) == len(tensors):
        return join(chunked, axis)
    return Concat(tensors, axis)


def stack(tensors: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Return equal-shaped tensors stacked along a new dim ``axis``."""
    return concat([t.reshape((*t.shape[:axis], 1, *t.shape[axis:])) for t in tensors], axis)


def from_array(array: np.ndarray, origin: str = "computed") -> LazyTensor:
    """Return a lazy tensor over a copy of a (small) array in memory."""
    from .chunked import Chunked
    from .source import MemorySource

    data = np.asarray(array, order="C")
    return Chunked.contiguous(
        MemorySource(Path(f"<{origin}>"), data.tobytes()), 0, data.shape, data.dtype
    )
