"""Cutting parameters into the flat vectors that ZeRO ranks hold: the inverse of ``zero12`` and
``zero3``.

Stages 1 and 2 join a parameter group and cut it into equal partitions, the end padded to a multiple
of 2 * ranks; stage 3 cuts every parameter by itself. Padding is zero. After
``runtime/zero/stage_1_and_2.py`` and ``stage3.py`` of DeepSpeed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import numpy as np

from .. import dtypes
from ..box import Index
from ..checkpoint import Tensors
from ..torchzip_plan import Run, Vector
from .zero3 import per_rank

_ALIGN = 2  # elements; DeepSpeed's nccl_start_alignment_factor


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """Parameters that lie one after the other in one flat vector.

    Attributes:
        shapes: parameters in flat order.
        world: ranks it is cut over.
    """

    shapes: Mapping[str, Index]
    world: int

    @property
    def total(self) -> int:
        """Elements without padding."""
        return sum(prod(s) for s in self.shapes.values())

    @property
    def size(self) -> int:
        """Elements of a partition, padding included."""
        step = _ALIGN * self.world
        return -(-self.total // step) * step // self.world

    def lean(self, rank: int) -> int:
        """Elements of a rank's partition that are no padding."""
        return max(0, min(self.size, self.total - rank * self.size))

    def vector(self, tensors: Tensors, rank: int, *, padded: bool) -> Vector:
        """A rank's partition of a state (or the masters); what a parameter lacks is zero."""
        names, starts = list(self.shapes), self._starts()
        lo = rank * self.size
        hi = lo + self.lean(rank)
        dtype = common_dtype(tensors, names)
        pieces: list[tuple[int, Run]] = []
        for k in self._touching(starts, lo, hi):
            tensor = tensors.get(names[k])
            if tensor is None:
                continue
            first = max(lo, starts[k])
            last = min(hi, starts[k] + tensor.size)
            run = (tensor.cast(dtype), first - starts[k], last - starts[k])
            pieces.append((first - lo, run))
        return Vector(dtype, self.size if padded else hi - lo, tuple(pieces))

    def slices(self, rank: int) -> dict[str, tuple[int, int]]:
        """Parameter to (start, elements) in a rank's partition."""
        names, starts = list(self.shapes), self._starts()
        lo, hi = rank * self.size, (rank + 1) * self.size
        found = {}
        for k in self._touching(starts, lo, hi):
            count = prod(self.shapes[names[k]])
            first, last = max(lo, starts[k]), min(hi, starts[k] + count)
            if first < last:
                found[names[k]] = (first - lo, last - first)
        return found

    def _starts(self) -> list[int]:
        return [0, *accumulate(prod(s) for s in self.shapes.values())][:-1]

    def _touching(self, starts: Sequence[int], lo: int, hi: int) -> Iterator[int]:
        """Indices of the parameters that meet ``[lo, hi)``."""
        if lo >= hi:
            return
        k = max(0, bisect_right(starts, lo) - 1)
        while k < len(starts) and starts[k] < hi:
            yield k
            k += 1


def common_dtype(tensors: Tensors, names: Sequence[str]) -> np.dtype:
    """The element type of a flat vector: that of all its parts, else fp32."""
    found = {tensors[n].dtype for n in names if n in tensors}
    return found.pop() if len(found) == 1 else dtypes.FLOAT32


def shard_vector(shapes: Mapping[str, Index], tensors: Tensors, rank: int, world: int) -> Vector:
    """A stage 3 rank's flat vector of a sub-group: its part of each parameter, padded alike."""
    dtype = common_dtype(tensors, list(shapes))
    pieces: list[tuple[int, Run]] = []
    at = 0
    for name, shape in shapes.items():
        count = prod(shape)
        step = per_rank(count, world)
        lo, hi = min(rank * step, count), min((rank + 1) * step, count)
        if name in tensors:
            pieces.append((at, (tensors[name].cast(dtype), lo, hi)))
        at += step
    return Vector(dtype, at, tuple(pieces))


def subgroups(shapes: Mapping[str, Index], world: int, limit: int) -> list[dict[str, Index]]:
    """Cut a parameter group as stage 3 does: a sub-group ends once its part reaches ``limit``."""
    found: list[dict[str, Index]] = []
    held = 0
    for name, shape in shapes.items():
        if not found or held >= limit:
            found.append({})
            held = 0
        found[-1][name] = shape
        held += per_rank(prod(shape), world)
    return found
