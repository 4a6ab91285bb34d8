"""Tensors cut out of flat vectors that several files share: ZeRO and FSDP partitions.

``FlatBuffer`` is a long vector whose consecutive parts lie in several files; ``from_runs`` makes a
tensor of any list of such pieces. The result is ``Deferred``: its chunk list is made when it is
first used, because a thousand parameters times hundreds of ranks would make opening slow while
most callers want shapes only.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np

from .box import flat_boxes, row_major
from .chunked import Chunk, Chunked
from .records import StoredTensor
from .source import FileSource, Source
from .tensor import LazyTensor

Run = tuple[Source, int, int]  # file, byte position, elements


class Deferred(Chunked):
    """A chunk list that is computed at first use.

    Two threads may both compute it; they get equal lists. ``outline`` has the files of its pieces,
    when these are known to make it whole without computing the list: thousands of weights times
    thousands of ranks are too many boxes to look at one by one. It is best shared between tensors.
    """

    __slots__ = ("_build", "_outline")

    def __init__(
        self,
        shape: Sequence[int],
        dtype: np.dtype,
        build: Callable[[], Iterable[Chunk]],
        outline: tuple[Path, ...] | None = None,
    ) -> None:
        LazyTensor.__init__(self, shape, dtype)
        self._bounds = None
        self._build = build
        self._outline = outline
        self.proven = outline is not None

    def files(self) -> tuple[Path, ...]:
        """Return the file of each piece."""
        return super().files() if self._outline is None else self._outline

    def forget(self) -> None:
        """Drop the computed list, which is made again when it is needed."""
        if self._outline is not None:
            self._bounds = None
            with suppress(AttributeError):
                del self.chunks

    def __getattr__(self, name: str) -> tuple[Chunk, ...]:
        # only called while the slot of the base class is empty
        if name != "chunks":
            raise AttributeError(name)
        self.chunks = tuple(self._build())
        return self.chunks


def from_runs(
    shape: Sequence[int],
    dtype: np.dtype,
    runs: Callable[[], Iterable[Run]],
    outline: tuple[Path, ...] | None = None,
) -> Deferred:
    """Return the row-major tensor whose elements are the given runs, one after the other.

    Args:
        shape, dtype: of the tensor.
        runs: gives the runs.
        outline: their files, if the caller has proven that they are whole and inside these.
    """
    dims = tuple(int(n) for n in shape)

    def build() -> Iterator[Chunk]:
        at, item, strides = 0, dtype.itemsize, row_major(dims, dtype.itemsize)
        for source, offset, count in runs():
            for (lo, hi), flat in flat_boxes(at, at + count, dims):
                yield Chunk(lo, hi, source, offset + (flat - at) * item, strides)
            at += count

    return Deferred(dims, dtype, build, outline)


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

    @property
    def inside(self) -> bool:
        """Whether it lies in its file."""
        end = self.offset + self.size * self.dtype.itemsize
        return self.offset >= 0 and end <= self.source.size

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
        inside: whether all parts lie in their files.
    """

    parts: tuple[Part, ...]
    ends: tuple[int, ...]
    inside: bool

    @classmethod
    def of(cls, parts: Sequence[Part]) -> FlatBuffer:
        """Join parts; there is at least one."""
        ends = tuple(accumulate(p.size for p in parts))
        return cls(tuple(parts), ends, all(p.inside for p in parts))

    def tensor(self, start: int, shape: Sequence[int]) -> LazyTensor:
        """Return elements ``start`` and following as a tensor of ``shape``."""
        first, stop = self.parts[0], start + prod(shape)
        outline = None
        if self.inside and 0 <= start <= stop <= self.ends[-1]:
            touched = self.parts[bisect_right(self.ends, start) : bisect_left(self.ends, stop) + 1]
            outline = tuple(p.source.path for p in touched if p.size) if stop > start else ()
        cut = from_runs(shape, first.dtype, lambda: self._runs(start, stop), outline)
        return finish(cut, first.swap)

    def _runs(self, start: int, stop: int) -> Iterator[Run]:
        k = bisect_right(self.ends, start)
        while start < stop and k < len(self.parts):
            part, end = self.parts[k], self.ends[k]
            first, until = end - part.size, min(stop, end)
            yield part.run(start - first, until - first)
            start, k = until, k + 1
