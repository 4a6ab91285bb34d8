"""The token-exact loss: the sum of the cross entropies over the tokens of the whole step.

A mean of per-rank means would weigh ranks with few valid labels too much; dividing the sum by the
global count makes the loss the same under every layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from .batch import IGNORE


def token_loss(logits: Tensor, labels: Tensor, total: Tensor) -> Tensor:
    """Return this rank's share of the mean loss.

    Args:
        logits: [batch, seq, vocab].
        labels: int64 [batch, seq]; ``IGNORE`` marks tokens that do not count.
        total: number of counted labels of the step over all ranks.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return functional.cross_entropy(wide, labels.flatten(), reduction="sum") / total


def count_labels(labels: Tensor) -> Tensor:
    """Return the number of labels that count, over all ranks."""
    return all_sum((labels != IGNORE).sum())


def all_sum(value: Tensor) -> Tensor:
    """Return the sum of ``value`` over all ranks, detached."""
    out = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(out)
    return out
