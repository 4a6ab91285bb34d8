"""What goes into an output file, as independent pieces of work.

A ``Payload`` is a run of output bytes of known length that can be produced slab by slab, in any
order, by any thread. Tensors whose file pieces land contiguously become plain copies; everything
else is rendered in slabs of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import numpy as np

from .box import Box, Index, extent, flat_boxes, row_major
from .chunked import Chunk, Chunked
from .source import FileSource
from .tensor import LazyTensor

COPY_LIMIT = 64 << 20  # bytes of one copy, so that progress and other threads get a turn


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes to be copied as they are.

    Attributes:
        source, position: where they are.
        at: where they go, relative to the payload.
        nbytes: how many.
    """

    source: FileSource
    position: int
    at: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Render:
    """Bytes to be computed.

    Attributes:
        at: where they go, relative to the payload.
        nbytes: how many.
        make: returns them (a contiguous buffer).
    """

    at: int
    nbytes: int
    make: Callable[[], np.ndarray | bytes]


Slab = Copy | Render


@dataclass(frozen=True, slots=True)
class Joint:
    """Bytes of several payloads of one group, computed from one read.

    Attributes:
        places: (member, where in that member's payload, bytes), in the order of ``make``.
        make: yields their bytes one after the other (contiguous buffers).
    """

    places: tuple[tuple[int, int, int], ...]
    make: Callable[[], Iterator[np.ndarray]]


class Payload(Protocol):
    """A run of output bytes."""

    @property
    def nbytes(self) -> int:
        """Exact length."""
        ...

    def slabs(self, limit: int) -> Iterator[Slab]:
        """Yield pieces that tile the payload; producing one needs at most about ``limit`` bytes."""
        ...

    def first_span(self) -> tuple[str, int]:
        """Return (file, byte) of the first source piece: payloads are worked off in this order."""
        ...


class Group(Protocol):
    """Payloads made from the same source, so that one read serves several output files."""

    @property
    def sizes(self) -> Sequence[int]:
        """Exact length of each member."""
        ...

    def joints(self, limit: int, members: Sequence[int]) -> Iterator[Joint]:
        """Yield pieces that tile the payloads of ``members``."""
        ...

    def first_span(self) -> tuple[str, int]:
        """As for a payload."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """One payload of a group; the writer takes the members of a group together."""

    group: Group
    index: int

    @property
    def nbytes(self) -> int:
        """This member's length."""
        return self.group.sizes[self.index]

    def first_span(self) -> tuple[str, int]:
        """The group's."""
        return self.group.first_span()

    def slabs(self, limit: int) -> Iterator[Slab]:
        """This member alone."""
        for joint in self.group.joints(limit, [self.index]):
            ((_, at, nbytes),) = joint.places
            yield Render(at, nbytes, _only(joint))


def _only(joint: Joint) -> Callable[[], np.ndarray]:
    return lambda: next(joint.make())


@dataclass(frozen=True, slots=True)
class BytesPayload:
    """Bytes at hand: headers, padding."""

    data: bytes

    @property
    def nbytes(self) -> int:
        """Length of the bytes."""
        return len(self.data)

    def slabs(self, limit: int) -> Iterator[Slab]:
        """One piece."""
        yield Render(0, len(self.data), lambda: self.data)

    def first_span(self) -> tuple[str, int]:
        """Before all files."""
        return "", 0


@dataclass(frozen=True, slots=True)
class TensorPayload:
    """A tensor's elements in row-major order, in its own dtype."""

    tensor: LazyTensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.nbytes

    def first_span(self) -> tuple[str, int]:
        """Where the tensor's first piece lies."""
        return first_span(self.tensor)

    def slabs(self, limit: int) -> Iterator[Slab]:
        """Plain copies where possible, else slabs read into memory."""
        if isinstance(self.tensor, Chunked):
            copies = _copies(self.tensor)
            if copies is not None:
                yield from copies
                return
        itemsize = self.tensor.dtype.itemsize
        # a slab is read into one buffer, and a child of a cast holds a second one
        for box, start in row_slabs(self.tensor.shape, max(1, limit // (3 * itemsize))):
            yield Render(start * itemsize, prod(extent(box)) * itemsize, _reader(self.tensor, box))


@dataclass(frozen=True, slots=True)
class RangePayload:
    """A row-major range of a tensor's elements, as ZeRO ranks hold.

    It is cut into boxes only when it is written: there is one for each weight, state and rank.

    Attributes:
        tensor: any shape.
        lo, hi: elements, row-major.
    """

    tensor: LazyTensor
    lo: int
    hi: int

    @property
    def nbytes(self) -> int:
        """Bytes of the range."""
        return (self.hi - self.lo) * self.tensor.dtype.itemsize

    def first_span(self) -> tuple[str, int]:
        """About where it lies: tensors in source order, ranges of a tensor in theirs."""
        path, start = first_span(self.tensor)
        return path, start + self.lo * self.tensor.dtype.itemsize

    def slabs(self, limit: int) -> Iterator[Slab]:
        """Those of the boxes."""
        for (first, last), flat in flat_boxes(self.lo, self.hi, self.tensor.shape):
            region = [slice(a, b) for a, b in zip(first, last, strict=True)]
            at = (flat - self.lo) * self.tensor.dtype.itemsize
            for slab in TensorPayload(self.tensor.slice(region)).slabs(limit):
                yield replace(slab, at=at + slab.at)


@dataclass(frozen=True, slots=True)
class EncodedPayload:
    """Rows of a tensor through an encoder (a GGUF block type): row r becomes ``row_bytes`` bytes.

    Attributes:
        tensor: any shape; the last dim is the row.
        encode: float rows [rows, cols] in the tensor's dtype to bytes [rows, row_bytes] (uint8).
        row_bytes: encoded bytes of a row.
        overhead: memory the encoder needs, as a multiple of the rows' own bytes.
    """

    tensor: LazyTensor
    encode: Callable[[np.ndarray], np.ndarray]
    row_bytes: int
    overhead: float = 4.0

    @property
    def nbytes(self) -> int:
        """Encoded bytes of all rows."""
        return prod(self.tensor.shape[:-1]) * self.row_bytes

    def first_span(self) -> tuple[str, int]:
        """Where the tensor's first piece lies."""
        return first_span(self.tensor)

    def slabs(self, limit: int) -> Iterator[Slab]:
        """Whole rows per slab; leading dims are flattened."""
        cols = self.tensor.shape[-1]
        if not self.nbytes:
            return
        budget = int(limit / ((1 + self.overhead) * self.tensor.dtype.itemsize))
        for box, start in row_slabs(self.tensor.shape, max(cols, budget), whole_rows=True):
            rows = prod(extent(box)[:-1])
            yield Render(
                start // cols * self.row_bytes, rows * self.row_bytes, self._maker(box, rows, cols)
            )

    def _maker(self, box: Box, rows: int, cols: int) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            return self.encode(_reader(self.tensor, box)().reshape(rows, cols))

        return make


def first_span(tensor: LazyTensor) -> tuple[str, int]:
    """Return (file, byte) of a tensor's first piece."""
    for path, start, _ in tensor.spans():
        return str(path), start
    return "", 0


def row_slabs(shape: Index, limit: int, *, whole_rows: bool = False) -> Iterator[tuple[Box, int]]:
    """Cut a tensor into boxes that are contiguous in row-major order, of at most ``limit``
    elements.

    With ``whole_rows`` the last dim is never cut, so a box may exceed the limit by being one row.

    Yields:
        (box, flat index of its first element), in order.
    """
    if prod(shape) == 0:
        return
    axes = len(shape) - 1 if whole_rows else len(shape)
    axis, inner = len(shape), 1
    while axis > 0 and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield ((0,) * len(shape), tuple(shape)), 0
        return
    axis = min(axis - 1, axes - 1)  # the dim that is cut; dims before it are walked one by one
    if axis < 0:
        yield ((0,) * len(shape), tuple(shape)), 0
        return
    inner = prod(shape[axis + 1 :])
    step = max(1, limit // inner)
    flat = row_major(shape)
    for lead in np.ndindex(*shape[:axis]):
        base = sum(i * f for i, f in zip(lead, flat, strict=False))
        for at in range(0, shape[axis], step):
            until = min(at + step, shape[axis])
            lo = (*lead, at, *(0 for _ in shape[axis + 1 :]))
            hi = (*(i + 1 for i in lead), until, *shape[axis + 1 :])
            yield (lo, hi), base + at * flat[axis]


def _reader(tensor: LazyTensor, box: Box) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        out = np.empty(extent(box), tensor.dtype)
        tensor.fill(out, box)
        return out

    return make


def _copies(tensor: Chunked) -> list[Copy] | None:
    """Return plain copies for the whole tensor, or None when some piece must be rearranged."""
    itemsize = tensor.dtype.itemsize
    flat = row_major(tensor.shape, itemsize)
    out: list[Copy] = []
    for chunk in tensor.chunks:
        if not (_lands_dense(chunk, tensor.shape) and chunk.is_dense(itemsize)):
            return None
        found = chunk.source.locate(chunk.offset)
        if found is None:
            return None
        source, position = found
        at = sum(a * f for a, f in zip(chunk.lo, flat, strict=True))
        nbytes = prod(extent((chunk.lo, chunk.hi))) * itemsize
        for done in range(0, nbytes, COPY_LIMIT):
            part = min(COPY_LIMIT, nbytes - done)
            out.append(Copy(source, position + done, at + done, part))
    return out


def _lands_dense(chunk: Chunk, shape: Sequence[int]) -> bool:
    """Whether the chunk's box is one contiguous run of the row-major output."""
    single = True
    for l, h, n in zip(chunk.lo, chunk.hi, shape, strict=True):
        if not single and (l != 0 or h != n):
            return False
        single = single and h - l == 1
    return True
