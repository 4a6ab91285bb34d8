"""Expression nodes: what cannot be written as a plain list of file pieces.

``Map`` changes values; movement is pushed below it, so that its child stays a chunk list. The
movement nodes (``Slice``, ``Permute``, ``Reshape``, ``Concat``) are the general case for children
that are not chunk lists; each reads only the regions of its children that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np

from .box import Box, Index, Region, extent, intersect, normalize, reshape_groups, view
from .tensor import Elementwise, LazyTensor


class Map(LazyTensor):
    """Values changed one by one. Movement commutes with it and goes below."""

    __slots__ = ("_base", "_fn")

    def __init__(self, base: LazyTensor, fn: Elementwise, dtype: np.dtype) -> None:
        super().__init__(base.shape, dtype)
        self._base = base
        self._fn = fn

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Read the base region and apply the function."""
        data = np.empty(extent(box), self._base.dtype)
        self._base.fill(data, box)
        out[...] = self._fn(data)

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The base's file pieces."""
        return self._base.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The base's leaves."""
        return self._base.leaves()

    def slice(self, region: Region) -> LazyTensor:
        """Slice the base."""
        return Map(self._base.slice(region), self._fn, self.dtype)

    def permute(self, axes: Sequence[int]) -> LazyTensor:
        """Permute the base."""
        return Map(self._base.permute(axes), self._fn, self.dtype)

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """Reshape the base."""
        return Map(self._base.reshape(shape), self._fn, self.dtype)


class Slice(LazyTensor):
    """A region of a tensor."""

    __slots__ = ("_base", "_lo")

    def __init__(self, base: LazyTensor, box: Box) -> None:
        super().__init__(extent(box), base.dtype)
        self._base = base
        self._lo = box[0]

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Read the shifted region."""
        self._base.fill(out, _shift(box, self._lo))

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The base's file pieces."""
        return self._base.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The base's leaves."""
        return self._base.leaves()

    def slice(self, region: Region) -> LazyTensor:
        """Slice the base directly."""
        return Slice(self._base, _shift(normalize(region, self.shape), self._lo))


class Permute(LazyTensor):
    """Dims reordered."""

    __slots__ = ("_axes", "_base")

    def __init__(self, base: LazyTensor, axes: Index) -> None:
        super().__init__([base.shape[a] for a in axes], base.dtype)
        self._base = base
        self._axes = axes

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Read the region with its dims put back, straight into a transposed view of ``out``."""
        back = np.argsort(self._axes)
        lo = tuple(box[0][i] for i in back)
        hi = tuple(box[1][i] for i in back)
        self._base.fill(out.transpose(back), (lo, hi))

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The base's file pieces."""
        return self._base.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The base's leaves."""
        return self._base.leaves()


class Reshape(LazyTensor):
    """A row-major reshape.

    Reads the smallest base box that covers the region, group of dims by group of dims.
    """

    __slots__ = ("_base", "_groups")

    def __init__(self, base: LazyTensor, shape: Index) -> None:
        super().__init__(shape, base.dtype)
        self._base = base
        self._groups = reshape_groups(base.shape, shape) if base.size else []

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Read a covering box of the base and pick the region out of it."""
        lo: list[int] = []
        hi: list[int] = []
        picks: list[slice | np.ndarray] = []
        sizes: list[int] = []
        for a, b in self._groups:
            new = self.shape[b.start : b.stop]
            part = (box[0][b.start : b.stop], box[1][b.start : b.stop])
            low, high, pick, size = _cover(self._base.shape[a.start : a.stop], new, part)
            lo += low
            hi += high
            picks.append(pick)
            sizes.append(size)
        data = np.empty([h - l for l, h in zip(lo, hi, strict=True)], self.dtype)
        self._base.fill(data, (tuple(lo), tuple(hi)))
        data = data.reshape(sizes)
        for axis, pick in enumerate(picks):
            if isinstance(pick, slice):
                data = data[(slice(None),) * axis + (pick,)]
            else:
                data = np.take(data, pick, axis=axis)
        out[...] = data.reshape(out.shape)

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The base's file pieces."""
        return self._base.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The base's leaves."""
        return self._base.leaves()

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """Reshape the base directly."""
        return self._base.reshape(shape)


class Concat(LazyTensor):
    """Tensors joined along one dim."""

    __slots__ = ("_axis", "_parts", "_starts")

    def __init__(self, parts: Sequence[LazyTensor], axis: int) -> None:
        shape = list(parts[0].shape)
        starts = [0]
        for p in parts:
            starts.append(starts[-1] + p.shape[axis])
        shape[axis] = starts[-1]
        super().__init__(shape, parts[0].dtype)
        self._parts = tuple(parts)
        self._axis = axis
        self._starts = starts

    def _inside(self, box: Box) -> Iterator[tuple[LazyTensor, Index, Box]]:
        for part, start in zip(self._parts, self._starts, strict=False):
            at = tuple(start if k == self._axis else 0 for k in range(self.ndim))
            common = intersect(_shift(((0,) * self.ndim, part.shape), at), box)
            if common is not None:
                yield part, at, common

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Read the touching parts into their places."""
        for part, at, common in self._inside(box):
            where = view(out, [(l - o, h - o) for l, h, o in zip(*common, box[0], strict=True)])
            part.fill(where, _shift(common, tuple(-a for a in at)))

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The parts' file pieces."""
        for part in self._parts:
            yield from part.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The parts' leaves."""
        for part in self._parts:
            yield from part.leaves()

    def slice(self, region: Region) -> LazyTensor:
        """Keep only the parts that the region touches (one slice of one expert stays one file
        range).
        """
        from .tensor import concat

        box = normalize(region, self.shape)
        cut = []
        for part, at, (lo, hi) in self._inside(box):
            cut.append(
                part.slice([slice(l - a, h - a) for l, h, a in zip(lo, hi, at, strict=True)])
            )
        return concat(cut, self._axis) if cut else Slice(self, box)

    def map(self, fn: Elementwise, dtype: np.dtype | None = None) -> LazyTensor:
        """Map each part."""
        return Concat([p.map(fn, dtype) for p in self._parts], self._axis)


def _shift(box: Box, by: Index) -> Box:
    lo = tuple(a + b for a, b in zip(box[0], by, strict=True))
    hi = tuple(a + b for a, b in zip(box[1], by, strict=True))
    return lo, hi


def _cover(
    old: Index, new: Index, box: Box
) -> tuple[list[int], list[int], slice | np.ndarray, int]:
    """Find the old box that covers a new box of the same flat space.

    Returns:
        lo and hi of the old box (it is one flat range), what to pick of that range, and the range's
        length.
    """
    lo, hi = box
    first = int(np.ravel_multi_index(lo, new)) if new else 0
    last = int(np.ravel_multi_index([h - 1 for h in hi], new)) if new else 0
    a = [int(i) for i in np.unravel_index(first, old)] if old else []
    z = [int(i) for i in np.unravel_index(last, old)] if old else []
    low, high, split = [], [], False
    for n, i, j in zip(old, a, z, strict=True):
        if split:
            low.append(0)
            high.append(n)
        else:
            low.append(i)
            high.append(j + 1)
            split = i != j
    start = int(np.ravel_multi_index(low, old)) if old else 0
    size = prod(h - l for l, h in zip(low, high, strict=True))
    if last - first + 1 == prod(extent(box)):
        return low, high, slice(first - start, last - start + 1), size
    index = np.ravel_multi_index(
        np.ix_(*[np.arange(l, h) for l, h in zip(lo, hi, strict=True)]), new
    )
    return low, high, index.reshape(-1) - start, size
