"""The normal form: a tensor as a list of chunks, each a box of the tensor and a strided piece of a
file.

Every movement operation maps chunk lists to chunk lists, so a parameter that was cut by TP, PP and
ZeRO at once is still one flat list of (box, file, offset, strides): easy to prove complete, to sort
by file position and to copy in the kernel. Only a reshape can multiply chunks (a strided box of
merged dims falls into rows); past a limit it stays an expression node instead, which reads whole
covering ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import numpy as np

from .box import (
    Box,
    Index,
    Region,
    extent,
    flat_boxes,
    flat_runs,
    intersect,
    normalize,
    reshape_groups,
    row_major,
    run_count,
    view,
)
from .source import MemorySource, Source
from .tensor import LazyTensor, resolve_shape

_SCRATCH = 256 << 10  # bytes read at once when a piece has to be rearranged in memory
_SHATTER = 64  # a reshape may always make this many chunks ...
_SHATTER_FACTOR = 8  # ... or this many times what it had


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and where its elements lie.

    Attributes:
        lo, hi: the box in tensor coordinates.
        source: the file.
        offset: byte position of the element at ``lo``.
        strides: bytes between neighbours along each dim (0 for broadcast dims).
    """

    lo: Index
    hi: Index
    source: Source
    offset: int
    strides: Index

    def within(self, box: Box) -> Chunk | None:
        """Return the part inside ``box`` (same coordinates), or None."""
        common = intersect((self.lo, self.hi), box)
        if common is None:
            return None
        lo, hi = common
        shift = sum((a - b) * s for a, b, s in zip(lo, self.lo, self.strides, strict=True))
        return Chunk(lo, hi, self.source, self.offset + shift, self.strides)

    def moved(self, delta: Index) -> Chunk:
        """Return the chunk with its box shifted by ``delta``."""
        return Chunk(
            tuple(a + d for a, d in zip(self.lo, delta, strict=True)),
            tuple(a + d for a, d in zip(self.hi, delta, strict=True)),
            self.source,
            self.offset,
            self.strides,
        )

    def span(self, itemsize: int) -> tuple[int, int]:
        """Return (first byte, end byte) in the source."""
        reach = sum((h - l - 1) * s for l, h, s in zip(self.lo, self.hi, self.strides, strict=True))
        return self.offset, self.offset + reach + itemsize

    def is_dense(self, itemsize: int) -> bool:
        """Whether the elements are contiguous in the source, in row-major order of the box."""
        step = itemsize
        for l, h, s in zip(
            reversed(self.lo), reversed(self.hi), reversed(self.strides), strict=True
        ):
            if h - l > 1 and s != step:
                return False
            step *= h - l
        return True


class Chunked(LazyTensor):
    """A tensor made of file pieces only."""

    __slots__ = ("_bounds", "chunks", "proven")

    def __init__(self, shape: Sequence[int], dtype: np.dtype, chunks: Sequence[Chunk]) -> None:
        super().__init__(shape, dtype)
        self.chunks = tuple(chunks)
        self.proven = False  # whether ``coverage`` has found it whole
        self._bounds: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def contiguous(
        cls, source: Source, offset: int, shape: Sequence[int], dtype: np.dtype
    ) -> Chunked:
        """A whole tensor in row-major order at ``offset`` bytes of ``source``."""
        return cls.strided(source, offset, shape, row_major(shape, np.dtype(dtype).itemsize), dtype)

    @classmethod
    def strided(
        cls,
        source: Source,
        offset: int,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: np.dtype,
    ) -> Chunked:
        """A whole tensor with explicit byte strides (a torch view of a bigger storage)."""
        dims = tuple(int(n) for n in shape)
        if prod(dims) == 0:
            return cls(dims, dtype, ())
        chunk = Chunk((0,) * len(dims), dims, source, offset, tuple(int(s) for s in strides))
        return cls(dims, dtype, (chunk,))

    # -- movement -------------------------------------------------------------

    def slice(self, region: Region) -> Chunked:
        """Slice by cutting the chunk boxes."""
        box = normalize(region, self.shape)
        lo, hi = box
        if (lo, hi) == ((0,) * self.ndim, self.shape):
            return self
        back = tuple(-a for a in lo)
        parts = (c.within(box) for c in self._touching(box))
        return Chunked(extent(box), self.dtype, [p.moved(back) for p in parts if p is not None])

    def permute(self, axes: Sequence[int]) -> Chunked:
        """Reorder dims of boxes and strides."""

        def pick(values: Index) -> Index:
            return tuple(values[a] for a in axes)

        return Chunked(
            pick(self.shape),
            self.dtype,
            [
                Chunk(pick(c.lo), pick(c.hi), c.source, c.offset, pick(c.strides))
                for c in self.chunks
            ],
        )

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """Recut the chunks for a new shape;

        stays an expression when they would shatter into rows.
        """
        target = resolve_shape(self.shape, shape)
        if target == self.shape:
            return self
        if self.size == 0:
            return Chunked(target, self.dtype, ())
        groups = reshape_groups(self.shape, target)
        limit = max(_SHATTER, _SHATTER_FACTOR * len(self.chunks))
        if sum(_recut_count(c, self.shape, groups) for c in self.chunks) > limit:
            return super().reshape(target)
        return Chunked(
            target,
            self.dtype,
            [piece for c in self.chunks for piece in _recut(c, self.shape, target, groups)],
        )

    # -- reading --------------------------------------------------------------

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """Yield (file, first byte, end byte) of each chunk."""
        for c in self.chunks:
            yield (c.source.path, *c.span(self.dtype.itemsize))

    def files(self) -> tuple[Path, ...]:
        """Return the file of each chunk."""
        return tuple([c.source.path for c in self.chunks])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes of all chunks: first and end index [chunks, dims]; there is a chunk."""
        if self._bounds is None:
            self._bounds = (
                np.array([c.lo for c in self.chunks], np.int64),
                np.array([c.hi for c in self.chunks], np.int64),
            )
        return self._bounds

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Read each touching chunk into its place in ``out``.

        Raises:
            FormatError: a source is short, or a part of the box is in no chunk.
        """
        lo = box[0]
        covered = 0
        for chunk in self._touching(box):
            part = chunk.within(box)
            if part is None:
                continue
            target = view(
                out, [(a - b, c - b) for a, c, b in zip(part.lo, part.hi, lo, strict=True)]
            )
            covered += target.size
            _fetch(part, target)
        if covered != out.size:
            from ..errors import FormatError

            raise FormatError(
                f"{out.size - covered} of {out.size} elements of a region are in no file: "
                "the checkpoint has a hole"
            )

    def _touching(self, box: Box) -> Sequence[Chunk]:
        """Chunks that may meet ``box``; vectorised once there are many."""
        if len(self.chunks) < 16:
            return self.chunks
        los, his = self.bounds()
        hit = np.all((los < np.array(box[1])) & (his > np.array(box[0])), axis=1)
        return [self.chunks[i] for i in np.flatnonzero(hit)]


def join(tensors: Sequence[Chunked], axis: int) -> Chunked:
    """Concatenate chunk lists along ``axis`` (shapes already checked)."""
    at = 0
    chunks: list[Chunk] = []
    shape = list(tensors[0].shape)
    for t in tensors:
        delta = tuple(at if k == axis else 0 for k in range(t.ndim))
        chunks += [c.moved(delta) for c in t.chunks] if at else list(t.chunks)
        at += t.shape[axis]
    shape[axis] = at
    return Chunked(shape, tensors[0].dtype, chunks)


def zeros(shape: Sequence[int], dtype: np.dtype) -> Chunked:
    """Return a lazy tensor of zeros that holds one element in memory."""
    source = MemorySource(Path("<zeros>"), bytes(dtype.itemsize))
    return Chunked.strided(source, 0, shape, [0] * len(shape), dtype)


def _recut_count(chunk: Chunk, old: Index, groups: list[tuple[range, range]]) -> int:
    """Upper bound of the pieces ``_recut`` makes of a chunk."""
    count = 1
    for a, b in groups:
        if len(a) == 1 and len(b) == 1:
            continue
        part = slice(a.start, a.stop)
        runs = run_count(chunk.lo[part], chunk.hi[part], old[part], chunk.strides[part])
        count *= runs * max(1, 2 * len(b) - 1)
    return count


def _recut(
    chunk: Chunk, old: Index, new: Index, groups: list[tuple[range, range]]
) -> Iterator[Chunk]:
    """Yield the chunks of the reshaped space that hold the elements of ``chunk``.

    Each group of dims is recut on its own: old sub-box -> flat runs -> new sub-boxes with a byte
    shift and strides.
    """
    options: list[list[tuple[Box, int, Index]]] = []
    for a, b in groups:
        part, target = slice(a.start, a.stop), new[b.start : b.stop]
        lo, hi, strides = chunk.lo[part], chunk.hi[part], chunk.strides[part]
        if len(a) == 1 and len(b) == 1:
            options.append([((lo, hi), 0, strides)])
            continue
        pieces = []
        for start, length, shift, step in flat_runs(lo, hi, old[part], strides):
            for box, flat in flat_boxes(start, start + length, target):
                pieces.append((box, shift + (flat - start) * step, row_major(target, step)))
        options.append(pieces)
    for choice in product(*options):
        yield Chunk(
            tuple(i for box, _, _ in choice for i in box[0]),
            tuple(i for box, _, _ in choice for i in box[1]),
            chunk.source,
            chunk.offset + sum(shift for _, shift, _ in choice),
            tuple(s for _, _, strides in choice for s in strides),
        )


def _fetch(chunk: Chunk, out: np.ndarray) -> None:
    """Read one chunk into ``out`` (same shape, any strides)."""
    itemsize = out.dtype.itemsize
    if chunk.is_dense(itemsize):
        if out.flags.c_contiguous:
            chunk.source.readinto(chunk.offset, out.reshape(-1).view(np.uint8).data)
            return
        _fetch_rows(chunk, out, dense=True)
        return
    _fetch_rows(chunk, out, dense=False)


def _fetch_rows(chunk: Chunk, out: np.ndarray, *, dense: bool) -> None:
    """Read a piece that needs rearranging, in slabs that fit the scratch buffer.

    A slab is one read of the bytes it spans. A span that is mostly other data (a few columns of a
    wide matrix) is split along its outermost dim first, so that no more than about 4x the wanted
    bytes are read for long rows.
    """
    itemsize = out.dtype.itemsize
    first, end = chunk.span(itemsize)
    ext = out.shape
    wide = end - first > _SCRATCH
    sparse = not dense and end - first > max(64 << 10, 4 * out.nbytes)
    axis = next((k for k in _by_stride(chunk.strides) if ext[k] > 1), None)
    if axis is not None and (wide or sparse):
        step = 1 if sparse else max(1, ext[axis] * _SCRATCH // (end - first))
        if step < ext[axis]:
            for at in range(0, ext[axis], step):
                until = min(at + step, ext[axis])
                lo = tuple(l + (at if k == axis else 0) for k, l in enumerate(chunk.lo))
                hi = tuple(chunk.lo[k] + until if k == axis else h for k, h in enumerate(chunk.hi))
                part = chunk.within((lo, hi))
                assert part is not None
                ends = [(at, until) if k == axis else (0, n) for k, n in enumerate(ext)]
                _fetch_rows(part, view(out, ends), dense=dense)
            return
    scratch = np.empty(end - first, np.uint8)
    chunk.source.readinto(first, scratch.data)
    out[...] = np.ndarray(ext, out.dtype, scratch.data, 0, chunk.strides)


def _by_stride(strides: Index) -> list[int]:
    return sorted(range(len(strides)), key=lambda k: -strides[k])
