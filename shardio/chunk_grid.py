"""Which rank of a dp x tp mesh holds which box of a tensor: how FSDP2 and TP cut together.

Tensor parallel cuts columns or rows by the layer's name, FSDP then cuts dim 0 of what a rank has,
both as ``torch.chunk`` does. Ranks count dp-major (``init_device_mesh("cpu", (dp, tp))``). Tensors
that tp leaves whole are stored by one tp rank, in turn, as DCP's planner spreads replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .box import Index
from .deepspeed.tp_names import usual_dim
from .placement import shard_range


@dataclass(frozen=True, slots=True)
class Cell:
    """A box of a tensor and the rank that stores it."""

    rank: int
    lo: Index
    hi: Index


def cells(name: str, shape: Index, *, tp: int, dp: int, turn: int = 0) -> Iterator[Cell]:
    """Yield the non-empty boxes of a tensor, in rank order; they tile it.

    Args:
        name: parameter name, which tells the tensor-parallel cut.
        shape: of the whole tensor.
        tp, dp: mesh sizes.
        turn: which rank stores what all of them hold.
    """
    if not shape:
        yield Cell(turn % (tp * dp), (), ())
        return
    dim = usual_dim(name) if tp > 1 else None
    if dim is not None and dim >= len(shape):
        dim = None
    whole = (0,) * len(shape)
    if 0 in shape:
        yield Cell(0, whole, shape)
        return
    for d in range(dp):
        for t in range(tp) if dim is not None else (turn % tp,):
            lo, hi = list(whole), list(shape)
            if dim is not None:
                lo[dim], hi[dim] = shard_range(shape[dim], t, tp)
            first, last = shard_range(hi[0] - lo[0], d, dp)
            lo[0], hi[0] = lo[0] + first, lo[0] + last
            if all(a < b for a, b in zip(lo, hi, strict=True)):
                yield Cell(d * tp + t, tuple(lo), tuple(hi))
