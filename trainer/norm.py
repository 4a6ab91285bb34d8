"""Norms, and weights that every rank of a tensor parallel group holds whole.

Such a weight is a ``DTensor`` with placement ``Replicate``, used as a plain tensor. Its gradient is
the same on all ranks if they saw the same rows, and else (``partial``) a part of a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial


def local(weight: Tensor, partial: bool = False) -> Tensor:
    """Return a weight as a plain tensor; ``partial``: replicas' gradients must be summed."""
    if not isinstance(weight, DTensor):
        return weight
    placements = [Partial() if partial and p.is_replicate() else p for p in weight.placements]
    return weight.to_local(grad_placements=placements)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``; the mean is taken in at least float32.

    With ``offset``, as in Gemma, the factor is 1 + weight, also in at least float32.
    """

    def __init__(self, size: int, eps: float, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if offset else torch.ones(size))
        self.eps, self.offset, self.partial = eps, offset, False

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight, self.partial)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (wide * (1 + weight.to(wide.dtype))).to(x.dtype)
        return weight * wide.to(x.dtype)
