"""Snap vectors to the point grids of the IQ1, IQ2 and IQ3 formats, in numpy or torch.

A vector of levels is packed in one integer (``bits`` per level, first level lowest). ``snap`` maps
vectors that are not on the grid to the best point of their neighbour list: all grid points within
the 1 to 3 smallest distinct distances. Same results as ``native/neighbour.hpp``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from ..grids import load_grid
from .search import Array, backend, real

_WORK = 1 << 22  # candidate points compared at once
_BUILD = 1 << 23

# Levels in use per coordinate, and how many distinct distances a neighbour list spans.
_SHAPES = {
    "IQ2_XXS": (3, 2), "IQ2_XS": (3, 2), "IQ2_S": (3, 1), "IQ1_S": (3, 3), "IQ1_M": (3, 3),
    "IQ3_XXS": (8, 2), "IQ3_S": (8, 3),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grid:
    """A grid and the neighbour lists of all other vectors.

    Attributes:
        dims, bits: coordinates of a point and bits of a packed level.
        code: packed vector to grid index, -1 when it is not on the grid.
        first, count: packed vector to its list's place in ``near`` and its length.
        near: packed grid points, list by list, nearest first.
    """

    dims: int
    bits: int
    code: Array
    first: Array
    count: Array
    near: Array


@cache
def grid(name: str, device: str = "") -> Grid:
    """Return the grid of a type as numpy arrays, or as torch tensors on ``device``."""
    if device:
        import torch

        host = grid(name)
        tables = (host.code, host.first, host.count, host.near)
        return Grid(host.dims, host.bits, *(torch.from_numpy(t).to(device) for t in tables))
    points, values = load_grid(name)
    levels, distances = _SHAPES[name]
    dims = values.size // points.size
    bits = 16 // dims if dims == 8 else 3
    code = np.full(1 << dims * bits, -1, np.int32)
    code[points] = np.arange(len(points))
    used = _packed_vectors(levels, dims, bits)
    return Grid(dims, bits, code, *_lists(points, used[code[used] < 0], dims, bits, distances))


def grid_like(name: str, x: Array) -> Grid:
    """Return the grid of a type where ``x`` lives."""
    return grid(name) if isinstance(x, np.ndarray) else grid(name, str(x.device))


def _packed_vectors(levels: int, dims: int, bits: int) -> npt.NDArray[np.int64]:
    every = np.arange(1 << dims * bits)
    parts = every[:, None] >> bits * np.arange(dims) & (1 << bits) - 1
    return every[(parts < levels).all(axis=1)]


def _lists(
    points: npt.NDArray[np.uint16],
    vectors: npt.NDArray[np.int64],
    dims: int,
    bits: int,
    distances: int,
) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """Return (first, count, near) as in ``Grid`` for off-grid ``vectors``."""
    shifts, mask = bits * np.arange(dims), (1 << bits) - 1
    there = (points[:, None].astype(np.int64) >> shifts & mask).astype(np.float32)
    first = np.zeros(1 << dims * bits, np.int64)
    count = np.zeros(1 << dims * bits, np.int64)
    near: list[npt.NDArray] = []
    size, step = 0, max(1, _BUILD // len(points))
    for start in range(0, len(vectors), step):
        part = vectors[start : start + step]
        here = (part[:, None] >> shifts & mask).astype(np.float32)
        far = (here**2).sum(1)[:, None] + (there**2).sum(1) - 2 * here @ there.T
        last = np.full((len(part), 1), -1, np.float32)
        for _ in range(distances):
            last = np.where(far > last, far, np.inf).min(axis=1, keepdims=True).astype(np.float32)
        row, point = np.nonzero(far <= last)
        order = np.lexsort((point, far[row, point], row))
        near.append(points[point[order]])
        lengths = np.bincount(row, minlength=len(part))
        first[part], count[part] = size + np.cumsum(lengths) - lengths, lengths
        size += int(lengths.sum())
    return first, count, np.concatenate(near).astype(np.int32)


def snap(
    grid: Grid,
    levels: Array,
    x: Array,
    w: Array,
    scale: Array,
    point: Array,
    wanted: Array,
) -> tuple[Array, Array]:
    """Replace packed vectors that miss the grid by the neighbour with the least weighted error.

    Args:
        grid: of the type.
        levels: value of each level, float32 [levels], or [blocks, levels] where it differs.
        x, w: float32 [groups * dims, blocks]: elements and the weights of their squared errors.
        scale: float32 [blocks].
        point: packed vectors, int32 [groups, blocks].
        wanted: which blocks, bool [blocks].

    Returns:
        The new vectors and which were on the grid, both [groups, blocks].
    """
    xp = backend(x)
    missed = (grid.code[_index(point)] < 0) & wanted
    group, block = xp.where(missed)
    if len(group):
        vector = point[group, block]
        count = grid.count[_index(vector)]
        order = xp.argsort(count)
        found = xp.zeros_like(vector)
        sizes = count[order]
        start = 0
        while start < len(order):
            # Lists of similar length form a batch, padded to the longest.
            stop = min(len(order), start + max(1, _WORK // int(sizes[-1])))
            batch = order[start:stop]
            found[batch] = _nearest(
                grid, levels, x, w, scale, group[batch], block[batch], vector[batch]
            )
            start = stop
        point = point + 0
        point[group, block] = found
    return point, ~missed


def _index(packed: Array) -> Array:
    return packed if isinstance(packed, np.ndarray) else packed.long()


def _nearest(
    grid: Grid,
    levels: Array,
    x: Array,
    w: Array,
    scale: Array,
    group: Array,
    block: Array,
    vector: Array,
) -> Array:
    """Best neighbour of each query (group, block), the first of the list on ties."""
    xp, mask = backend(x), (1 << grid.bits) - 1
    first, count = grid.first[_index(vector)], grid.count[_index(vector)]
    place = xp.arange(int(count.max()))
    if xp.__name__ != "numpy":
        place = place.to(x.device)
    inside = xp.where(place < count[:, None], place, xp.zeros_like(place))
    near = grid.near[first[:, None] + inside]
    error = None
    for i in range(grid.dims):
        at = group * grid.dims + i
        value = scale[block][:, None] * (levels if levels.ndim == 1 else levels[block])
        diff = value - x[at, block][:, None]
        table = w[at, block][:, None] * diff * diff
        row = near >> grid.bits * i & mask
        term = (
            np.take_along_axis(table, row, 1) if xp.__name__ == "numpy"
            else xp.gather(table, 1, row.long())
        )  # fmt: skip
        error = term if error is None else error + term
    error = xp.where(xp.isnan(error), xp.full_like(error, float("inf")), error)
    low = error.min(1) if xp.__name__ == "numpy" else error.amin(1)
    order = xp.where(error == low[:, None], place, xp.full_like(place, 1 << 30))
    best = order.min(1) if xp.__name__ == "numpy" else order.amin(1)
    if xp.__name__ == "numpy":
        return near[np.arange(len(best)), best]
    return near.gather(1, best[:, None])[:, 0]


def odd_levels(x: Array, count: int) -> Array:
    """The values 1, 3, 5, ... of IQ2 and IQ3 levels, where ``x`` lives."""
    xp = backend(x)
    steps = xp.arange(count)
    return real(2 * steps + 1) if xp.__name__ == "numpy" else real(2 * steps + 1).to(x.device)
