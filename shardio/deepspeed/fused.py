"""Placements that only DeepSpeed's checkpoint rules need: averaged and added parameters, and fused
matrices that are cut unevenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import LayoutError
from ..box import Box, Index, extent
from ..chunked import zeros
from ..placement import Placement
from ..tensor import LazyTensor, concat


class Mean(LazyTensor):
    """The arithmetic mean (or another quotient of the sum) of equal-shaped tensors, taken in
    float32 in their order.
    """

    __slots__ = ("_divisor", "_parts")

    def __init__(self, parts: Sequence[LazyTensor], divisor: int = 0) -> None:
        super().__init__(parts[0].shape, parts[0].dtype)
        self._parts = tuple(parts)
        self._divisor = np.float32(divisor or len(parts))

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Add the parts up and divide."""
        total = np.zeros(extent(box), np.float32)
        piece = np.empty(extent(box), self.dtype)
        for part in self._parts:
            part.fill(piece, box)
            total += piece.astype(np.float32)
        out[...] = (total / self._divisor).astype(self.dtype)

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The file pieces of all parts."""
        for part in self._parts:
            yield from part.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The leaves of all parts."""
        for part in self._parts:
            yield from part.leaves()


@dataclass(frozen=True, slots=True)
class Average(Placement):
    """Every rank trains its own copy, and the model is their mean (BLOOM's layer norms)."""

    def cut(self, tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
        """The tensor itself."""
        return tensor

    def assemble(self, parts: Sequence[LazyTensor], shape: Index | None = None) -> LazyTensor:
        """The mean of the parts."""
        if any(p.shape != parts[0].shape for p in parts):
            raise LayoutError(f"parts of shapes {[p.shape for p in parts]} cannot be averaged")
        return Mean(parts)

    def __str__(self) -> str:
        return "Average"


@dataclass(frozen=True, slots=True)
class Sum(Placement):
    """Every rank adds its own one, and the model's is their sum (GPT-NeoX's row biases)."""

    def cut(self, tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
        """The tensor itself on the first rank, zeros on the others."""
        return tensor if rank == 0 else zeros(tensor.shape, tensor.dtype)

    def assemble(self, parts: Sequence[LazyTensor], shape: Index | None = None) -> LazyTensor:
        """The sum of the parts."""
        if any(p.shape != parts[0].shape for p in parts):
            raise LayoutError(f"parts of shapes {[p.shape for p in parts]} cannot be added")
        return Mean(parts, 1)

    def __str__(self) -> str:
        return "Sum"


@dataclass(frozen=True, slots=True)
class Blocks(Placement):
    """Fused matrices of which each rank has its own width.

    Attributes:
        dim: the dim the matrices are joined and cut on.
        widths: for each matrix, the size on each rank.
    """

    dim: int
    widths: tuple[tuple[int, ...], ...]

    def cut(self, tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
        """The rank's slice of each matrix, joined."""
        pieces, start = [], 0
        for block in self.widths:
            at = start + sum(block[:rank])
            pieces.append(_range(tensor, self.dim, at, at + block[rank]))
            start += sum(block)
        return concat(pieces, self.dim)

    def assemble(self, parts: Sequence[LazyTensor], shape: Index | None = None) -> LazyTensor:
        """Each matrix from its slices on all ranks, then the matrices joined."""
        for r, part in enumerate(parts):
            want = [block[r] if r < len(block) else -1 for block in self.widths]
            if part.ndim <= self.dim or part.shape[self.dim] != sum(want):
                raise LayoutError(f"rank {r} holds {part.shape}, expected widths {want}")
        pieces = []
        for k, block in enumerate(self.widths):
            for r, part in enumerate(parts):
                at = sum(b[r] for b in self.widths[:k])
                pieces.append(_range(part, self.dim, at, at + block[r]))
        return concat(pieces, self.dim)

    def __str__(self) -> str:
        return f"Blocks({self.dim}, {'+'.join(str(sum(b)) for b in self.widths)})"


def _range(tensor: LazyTensor, dim: int, start: int, stop: int) -> LazyTensor:
    return tensor.slice([slice(None)] * dim + [slice(start, stop)])
