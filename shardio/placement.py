"""Placements: how one mesh axis cuts one tensor, as an invertible pair ``cut`` / ``assemble`` on
lazy tensors.

Readers assemble, writers cut, with the same objects, so ``assemble(cut(x)) == x`` is the whole
contract (and a property test). Terms follow torch's DTensor (Replicate, Shard) and Megatron-LM and
DeepSpeed for the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..errors import LayoutError
from .box import Index
from .tensor import LazyTensor, concat


class Placement(ABC):
    """How a tensor lies on the ranks of one axis."""

    __slots__ = ()

    @abstractmethod
    def cut(self, tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
        """Return what ``rank`` of ``world`` holds.

        Raises LayoutError when the tensor cannot be cut so.
        """

    @abstractmethod
    def assemble(self, parts: Sequence[LazyTensor], shape: Index | None = None) -> LazyTensor:
        """Return the whole tensor from the parts in rank order (``shape`` where parts do not tell
        it).
        """


@dataclass(frozen=True, slots=True)
class Replicate(Placement):
    """Every rank holds the whole tensor."""

    def cut(self, tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
        """The tensor itself."""
        return tensor

    def assemble(self, parts: Sequence[LazyTensor], shape: Index | None = None) -> LazyTensor:
        """The first copy;

        comparing the others is the caller's business (``Checkpoint.replicas``).
        """
        return parts[0]

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True, slots=True)
class Shard(Placement):
    """Split on ``dim`` as ``torch.chunk`` does: ceil(n / world) per rank, the last ones short or
    empty.

    Attributes:
        dim: the dim that is cut.
        even: refuse sizes that the world does not divide (Megatron's rule).
    """

    dim: int
    even: bool = False

    def cut(self, tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
        """The rank's slice."""
        lo, hi = shard_range(tensor.shape[self.dim], rank, world, even=self.even)
        return tensor.slice([slice(None)] * self.dim + [slice(lo, hi)])

    def assemble(self, parts: Sequence[LazyTensor], shape: Index | None = None) -> LazyTensor:
        """The parts joined on ``dim``."""
        return concat(parts, self.dim)

    def __str__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True, slots=True)
class Fused(Placement):
    """Several matrices in one, each cut on its own: a rank holds [gate_i ; up_i], or its widths of
    q, k and v.

    Attributes:
        dim: the dim the matrices are joined and cut on.
        widths: their sizes along ``dim`` in the whole tensor.
    """

    dim: int
    widths: tuple[int, ...]

    def cut(self, tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
        """The rank's slice of each matrix, joined."""
        inner = Shard(self.dim, even=True)
        return concat(
            [inner.cut(p, rank, world) for p in _split(tensor, self.dim, self.widths)], self.dim
        )

    def assemble(self, parts: Sequence[LazyTensor], shape: Index | None = None) -> LazyTensor:
        """Each matrix from its slices on all ranks, then the matrices joined."""
        world = len(parts)
        if any(w % world for w in self.widths):
            raise LayoutError(f"fused widths {self.widths} do not divide over {world} ranks")
        pieces = [_split(p, self.dim, [w // world for w in self.widths]) for p in parts]
        return concat([p[k] for k in range(len(self.widths)) for p in pieces], self.dim)

    def __str__(self) -> str:
        return f"Fused({self.dim}, {'+'.join(map(str, self.widths))})"


@dataclass(frozen=True, slots=True)
class Flat(Placement):
    """Flattened and cut into equal ranges, the end padded: ZeRO-3 and FSDP1 per parameter.

    Parts may carry padding at their end; ``assemble`` needs the shape and drops it.
    """

    def cut(self, tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
        """The rank's range without padding (the last ranks may be short or empty)."""
        lo, hi = shard_range(tensor.size, rank, world)
        return tensor.reshape((-1,) if tensor.size else (0,)).slice([slice(lo, hi)])

    def assemble(self, parts: Sequence[LazyTensor], shape: Index | None = None) -> LazyTensor:
        """The ranges joined, trimmed to the shape's size, reshaped.

        Raises:
            LayoutError: the ranges hold fewer elements than the shape.
        """
        assert shape is not None, "flat ranges do not carry a shape"
        flat = concat([p.reshape((p.size,)) for p in parts])
        size = prod(shape)
        if flat.size < size:
            raise LayoutError(f"flat ranges hold {flat.size} elements, shape {shape} needs {size}")
        return flat.slice([slice(0, size)]).reshape(shape)

    def __str__(self) -> str:
        return "Flat"


@dataclass(frozen=True, slots=True)
class Stage(Placement):
    """The whole tensor lives on one pipeline stage.

    Attributes:
        index: the stage that owns it.
    """

    index: int

    def cut(self, tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
        """The tensor on its stage; asking another stage for it is a bug of ours."""
        assert rank == self.index, f"stage {rank} does not own a tensor of stage {self.index}"
        return tensor

    def assemble(self, parts: Sequence[LazyTensor], shape: Index | None = None) -> LazyTensor:
        """The owner's copy (``parts`` holds just that one, or one per stage)."""
        return parts[self.index if len(parts) > 1 else 0]

    def __str__(self) -> str:
        return f"Stage({self.index})"


def shard_range(n: int, rank: int, world: int, *, even: bool = False) -> tuple[int, int]:
    """Return the index range of a rank by the ``torch.chunk`` rule.

    Raises:
        LayoutError: ``even`` and the world does not divide ``n``.
    """
    if even and n % world:
        raise LayoutError(f"size {n} cannot be cut into {world} equal parts")
    step = -(-n // world)
    return min(rank * step, n), min((rank + 1) * step, n)


def _split(tensor: LazyTensor, dim: int, widths: Sequence[int]) -> list[LazyTensor]:
    if sum(widths) != tensor.shape[dim]:
        raise LayoutError(f"dim {dim} of shape {tensor.shape} is not the sum of {tuple(widths)}")
    parts, at = [], 0
    for w in widths:
        parts.append(tensor.slice([slice(None)] * dim + [slice(at, at + w)]))
        at += w
    return parts
