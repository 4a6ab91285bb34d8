"""Tensors cut out of flat vectors that several files share: ZeRO and FSDP partitions.

``FlatBuffer`` is a long vector whose consecutive parts lie in several files; ``from_runs`` makes a
tensor of any list of such pieces. The result is ``Deferred``: its chunk list is made when it is
first used, because a thousand parameters times hundreds of ranks would make opening slow while
most callers want shapes only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import numpy as np

from .box import flat_boxes, row_major
from .chunked import Chunk, Chunked
from .records import StoredTensor
from .source import FileSource, Source
from .tensor import LazyTensor

Run = tuple[Source, int, int]  # file, byte position, elements


class Deferred(Chunked):
    """A chunk list that is computed at first use.

    Two threads may both compute it; they get equal lists.
    """

    __slots__ = ("_build",)

    def __init__(
        self, shape: Sequence[int], dtype: np.dtype, build: Callable[[], Iterable[Chunk]]
    ) -> None:
        LazyTensor.__init__(self, shape, dtype)
        self._bounds = None
        self._build = build

    def __getattr__(self, name: str) -> tuple[Chunk, ...]:
        # only called while the slot of the base class is empty
        if name != "chunks":
            raise AttributeError(name)
        self.chunks = tuple(self._build())
        return self.chunks


def from_runs(shape: Sequence[int], dtype: np.dtype, runs: Callable[[], Iterable[Run]]) -> Deferred:
    """Return the row-major tensor whose elements are the given runs, one after the other."""
    dims = tuple(int(n) for n in shape)

    def build() -> Iterator[Chunk]:
        at, item, strides = 0, dtype.itemsize, row_major(dims, dtype.itemsize)
        for source, offset, count in runs():
            for (lo, hi), flat in flat_boxes(at, at + count, dims):
                yield Chunk(lo, hi, source, offset + (flat - at) * item, strides)
            at += count

    return Deferred(dims, dtype, build)


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous 1-D tensor in a file.

    Attributes:
        source: the file.
        offset: byte of the first element.
        size: elements.
        dtype: their type, native byte order.
        swap: the file has the other byte order.
    """

    source: FileSource
    offset: int
    size: int
    dtype: np.dtype
    swap: bool

    @classmethod
    def of(cls, stored: StoredTensor, source: FileSource) -> Part:
        """Wrap a saved tensor whose elements lie in order without gaps."""
        storage = stored.storage
        return cls(source, stored.file_offset, stored.numel, stored.dtype, storage.big_endian)

    def run(self, start: int, stop: int) -> Run:
        """Return elements ``start`` to ``stop`` as a piece of the file."""
        return self.source, self.offset + start * self.dtype.itemsize, stop - start


def finish(tensor: LazyTensor, swap: bool) -> LazyTensor:
    """Return the tensor with its bytes put in native order where ``swap`` says so."""
    return tensor.map(np.ndarray.byteswap) if swap and tensor.dtype.itemsize > 1 else tensor


@dataclass(frozen=True, slots=True)
class FlatBuffer:
    """A vector whose parts follow each other in several files.

    Attributes:
        parts: in order; all of one dtype and byte order.
        ends: index behind the last element of each part.
    """

    parts: tuple[Part, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> FlatBuffer:
        """Join parts; there is at least one."""
        return cls(tuple(parts), tuple(accumulate(p.size for p in parts)))

    def tensor(self, start: int, shape: Sequence[int]) -> LazyTensor:
        """Return elements ``start`` and following as a tensor of ``shape``."""
        first = self.parts[0]
        cut = from_runs(shape, first.dtype, lambda: self._runs(start, start + prod(shape)))
        return finish(cut, first.swap)

    def _runs(self, start: int, stop: int) -> Iterator[Run]:
        k = bisect_right(self.ends, start)
        while start < stop and k < len(self.parts):
            part, end = self.parts[k], self.ends[k]
            first, until = end - part.size, min(stop, end)
            yield part.run(start - first, until - first)
            start, k = until, k + 1
