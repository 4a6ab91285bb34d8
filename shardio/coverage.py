"""Proof that a tensor is whole: every element in exactly one chunk, every chunk inside its file.

Done on the metadata alone, before a byte is written, so that a missing rank or a lying header is
refused by name instead of becoming zeros in the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import FormatError
from .box import Box, extent, intersect, volume
from .chunked import Chunk, Chunked
from .tensor import LazyTensor

_MANY = 8  # chunks from which arrays are quicker than loops
_PATIENCE = 2000  # boxes held while looking for the place of a hole; only for the message


@dataclass(frozen=True, slots=True)
class Flaw:
    """Why a tensor is not whole.

    Attributes:
        name: the tensor.
        problem: in plain words, with the file where one is to blame.
    """

    name: str
    problem: str


def flaws(tensors: Mapping[str, LazyTensor]) -> list[Flaw]:
    """Return what is wrong with each tensor; an empty list is the proof of coverage."""
    found = []
    for name, tensor in tensors.items():
        for leaf in tensor.leaves():
            if isinstance(leaf, Chunked) and not leaf.proven:
                problem = None if _is_grid(leaf) else _problem(leaf)
                leaf.proven = problem is None
                if problem:
                    found.append(Flaw(name, problem))
    return found


def covered(tensors: Mapping[str, LazyTensor]) -> int:
    """Return how many elements are in a file, at most all; those that lie twice count once if
    nothing is missing elsewhere. For people: ``flaws`` is the proof.
    """
    count = 0
    for tensor in tensors.values():
        held = size = 0
        for leaf in tensor.leaves():
            size += leaf.size
            held += _held(leaf) if isinstance(leaf, Chunked) else leaf.size
        count += tensor.size * min(held, size) // max(size, 1)
    return count


def _held(tensor: Chunked) -> int:
    full: Box = ((0,) * tensor.ndim, tensor.shape)
    total = 0
    for c in tensor.chunks:
        first, end = c.span(tensor.dtype.itemsize)
        common = intersect((c.lo, c.hi), full)
        if common is not None and first >= 0 and end <= c.source.size:
            total += volume(common)
    return min(total, tensor.size)


def prove(tensors: Mapping[str, LazyTensor], where: object = "") -> None:
    """Raise FormatError naming the first tensors that have holes, overlaps or bytes outside their
    file.
    """
    bad = flaws(tensors)
    if bad:
        lines = [f"{f.name}: {f.problem}" for f in bad[:5]]
        more = f" (and {len(bad) - 5} more tensors)" if len(bad) > 5 else ""
        raise FormatError(f"{where}: the checkpoint is not whole: {'; '.join(lines)}{more}")


def _is_grid(tensor: Chunked) -> bool:
    """Whether the chunks are the cells of a grid over the whole tensor and lie in their files.

    That is proof enough, and quick for the hundreds of thousands of chunks of large worlds.
    """
    chunks = tensor.chunks
    if len(chunks) < _MANY or not tensor.ndim:
        return False
    try:
        lo, hi = tensor.bounds()
        strides = np.array([c.strides for c in chunks], np.int64)
        first = np.array([c.offset for c in chunks], np.int64)
        sizes = np.array([c.source.size for c in chunks], np.int64)
    except (OverflowError, ValueError):  # numbers of a damaged file
        return False
    reach = ((hi - lo - 1).astype(np.float64) * strides).sum(axis=1)  # floats cannot wrap around
    if (first < 0).any() or (strides < 0).any() or (reach > 2**52).any():
        return False
    if (first + reach.astype(np.int64) + tensor.dtype.itemsize > sizes).any():
        return False
    cell = np.zeros(len(chunks), np.int64)
    count = 1
    for axis, length in enumerate(tensor.shape):
        cuts = np.unique(lo[:, axis])
        at = np.searchsorted(cuts, lo[:, axis])
        if cuts[0] != 0 or (hi[:, axis] != np.append(cuts[1:], length)[at]).any():
            return False
        count *= len(cuts)
        cell = cell * len(cuts) + at
    return count == len(chunks) == len(np.unique(cell))


def _problem(tensor: Chunked) -> str | None:
    itemsize = tensor.dtype.itemsize
    full: Box = ((0,) * tensor.ndim, tensor.shape)
    total = 0
    for c in tensor.chunks:
        first, end = c.span(itemsize)
        if first < 0 or end > c.source.size:
            return (
                f"{c.source.path} has {c.source.size} bytes, the tensor needs bytes {first}..{end}"
            )
        box = (c.lo, c.hi)
        if intersect(box, full) != box:
            return f"{c.source.path} holds {show(box)}, outside the shape {tensor.shape}"
        total += volume(box)
    pair = _overlap(tensor.chunks)
    if pair:
        a, b = pair
        one, other = show((a.lo, a.hi)), show((b.lo, b.hi))
        return f"{one} of {a.source.path} overlaps {other} of {b.source.path}"
    if total != tensor.size:
        hole = _hole(tensor)
        place = f", first hole at {show(hole)}" if hole else ""
        return f"{tensor.size - total} of {tensor.size} elements are in no file{place}"
    return None


def _overlap(chunks: tuple[Chunk, ...]) -> tuple[Chunk, Chunk] | None:
    """Sweep along the dim with the most cuts; only chunks alive at the same place are compared."""
    if len(chunks) < 2:
        return None
    axis = max(range(len(chunks[0].lo)), key=lambda k: len({c.lo[k] for c in chunks}), default=None)
    if axis is None:
        return chunks[0], chunks[1]
    alive: list[Chunk] = []
    for c in sorted(chunks, key=lambda c: c.lo[axis]):
        alive = [a for a in alive if a.hi[axis] > c.lo[axis]]
        for a in alive:
            if intersect((a.lo, a.hi), (c.lo, c.hi)):
                return a, c
        alive.append(c)
    return None


def _hole(tensor: Chunked) -> Box | None:
    """Return a box that no chunk covers (None when finding it would take too long)."""
    rest: list[Box] = [((0,) * tensor.ndim, tensor.shape)]
    for c in tensor.chunks:
        rest = [piece for box in rest for piece in _minus(box, (c.lo, c.hi))]
        if len(rest) > _PATIENCE:
            return None
    return min(rest) if rest else None


def _minus(box: Box, hole: Box) -> list[Box]:
    common = intersect(box, hole)
    if common is None:
        return [box]
    parts = []
    lo, hi = list(box[0]), list(box[1])
    for k in range(len(lo)):
        if lo[k] < common[0][k]:
            parts.append((tuple(lo), (*hi[:k], common[0][k], *hi[k + 1 :])))
        if common[1][k] < hi[k]:
            parts.append(((*lo[:k], common[1][k], *lo[k + 1 :]), tuple(hi)))
        lo[k], hi[k] = common[0][k], common[1][k]
    return [(tuple(a), tuple(b)) for a, b in parts if all(extent((tuple(a), tuple(b))))]


def show(box: Box) -> str:
    """Write a box as people do: ``[0:128, 64:128]``."""
    return "[" + ", ".join(f"{l}:{h}" for l, h in zip(*box, strict=True)) + "]"
