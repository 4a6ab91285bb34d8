"""The low-rank update of a linear layer: ``out = x W^T + s * drop(x) A^T B^T``, W frozen.

A layer gets its update after tensor parallelism has cut it and before data parallelism shares it:
A follows the cut of W's columns and B that of its rows; what is not cut is whole on every rank.
Source: Hu et al. 2021; initial values and names are PEFT's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn import functional

from ..attention import local
from ..settings.sections import LoraConfig
from .dropout import RowDropout


class Factor(nn.Module):
    """One of the two matrices of an update; ``start`` says how it begins."""

    def __init__(self, weight: Tensor, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.start = start

    def initial(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return uniform values within ``start``, as PEFT draws A (B starts at zero)."""
        return torch.empty(shape).uniform_(-self.start, self.start, generator=generator)


class LoraLinear(nn.Linear):
    """A frozen linear layer with an update.

    Layers become this by a change of class, as those of FSDP do: parameters keep their names, and
    the hooks that cut inputs and outputs stay where they are.
    """

    lora_A: Factor  # noqa: N815 - PEFT's names
    lora_B: Factor  # noqa: N815
    scale: float
    dropout: RowDropout | None

    def adapt(self, config: LoraConfig, dropout: RowDropout | None) -> None:
        """Make the factors, on the weight's device, cut as the weight is."""
        rows, columns = self.weight.shape
        self.scale = config.alpha / (config.rank**0.5 if config.rslora else config.rank)
        self.dropout = dropout
        self.lora_A = Factor(self._like((config.rank, columns), 1), columns**-0.5)
        self.lora_B = Factor(self._like((rows, config.rank), 0), 0.0)

    def _like(self, shape: tuple[int, int], dim: int) -> Tensor:
        """Return an empty matrix that is cut where the weight is cut along ``dim``."""
        weight = self.weight
        whole = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        if not isinstance(weight, DTensor):
            return whole
        cuts: list[Placement] = [p if p == Shard(dim) else Replicate() for p in weight.placements]
        return distribute_tensor(whole, weight.device_mesh, cuts, src_data_rank=None)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        seen = x if self.dropout is None or not torch.is_grad_enabled() else self.dropout(x)
        a, b = (local(factor.weight, partial=True) for factor in (self.lora_A, self.lora_B))
        if isinstance(seen, DTensor):  # of whole rows the update's gradient is a part of a sum
            cuts = [Partial() if p.is_replicate() else p for p in seen.placements]
            seen = seen.to_local(grad_placements=cuts)
        update = functional.linear(functional.linear(seen, a), b) * self.scale
        if isinstance(out, DTensor):
            update = DTensor.from_local(update, out.device_mesh, out.placements, run_check=False)
        return out + update
