"""The token-exact loss: the sum of the cross entropies over the tokens of the whole step.

A mean of per-rank means would weigh ranks with few valid labels too much; dividing the sum by the
global count makes the loss the same under every layout, with any accumulation.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from .batch import IGNORE


def token_loss(logits: Tensor, labels: Tensor, total: float) -> Tensor:
    """Return this rank's share of the mean loss.

    Args:
        logits: [rows, seq, vocab]; a ``DTensor`` cut over the vocabulary under loss parallelism.
        labels: int64 [rows, seq]; ``IGNORE`` marks tokens that do not count.
        total: number of counted labels of the step over all ranks; 1 for the plain sum.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    loss = functional.cross_entropy(wide, labels.flatten(), reduction="sum", ignore_index=IGNORE)
    return (loss.to_local() if isinstance(loss, DTensor) else loss) / total


def count_labels(labels: Tensor, group: dist.ProcessGroup | None = None) -> int:
    """Return the number of labels that count, over the ranks of ``group``."""
    return int(all_sum((labels != IGNORE).sum(), group))


def all_sum(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of ``value`` over the ranks of ``group`` (None: this rank), detached."""
    out = value.detach().clone()
    if group is not None:
        dist.all_reduce(out, group=group)
    return out
