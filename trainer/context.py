"""Context parallelism: each rank has a stretch of every row, and gathers all keys and values.

A query sees all keys before it, so keys and values of the whole row are gathered, which the ranks'
queries then share out. The gathering is a ``DTensor`` redistribution: its gradient, a reduce
scatter, comes with it. It works on every backend and with every mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .batch import Batch


@dataclass(frozen=True, slots=True)
class Context:
    """This rank's stretch: the ``rank``-th of ``size`` equal ones."""

    mesh: DeviceMesh
    rank: int
    size: int
    device: torch.device

    def gather(self, x: Tensor) -> Tensor:
        """Return [rows, heads, all seq, head_dim] of this rank's [rows, heads, seq, head_dim]."""
        part = DTensor.from_local(x, self.mesh, [Shard(2)], run_check=False)
        return part.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def total(self, counts: Tensor) -> Tensor:
        """Return the sum of ``counts`` over the stretches; it has no gradient."""
        torch.distributed.all_reduce(counts, group=self.mesh.get_group())
        return counts

    def part(self, batch: Batch) -> Batch:
        """Return this rank's stretch of whole rows; documents stay whole, for the masks."""
        size = batch.inputs.shape[1] // self.size
        part = slice(self.rank * size, (self.rank + 1) * size)
        inputs, labels = batch.inputs[:, part], batch.labels[:, part]
        return Batch(inputs, labels, batch.positions[:, part], batch.documents)
