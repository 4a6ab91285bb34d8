"""One step forward and backward on a rank: loss, accumulation, loss parallelism, evaluation.

``PlainEngine`` runs a whole model, ``pipeline.py`` a part of one; both give the exact loss of the
step over all ranks: the sum of the cross entropies over all tokens, divided by their global count.
A mean of per-rank means would weigh ranks with few valid labels too much, under every layout
differently.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional

from .batch import IGNORE, Batch
from .mesh import DP, TOKENS
from .moe import MoE
from .settings import RunConfig
from .state import TrainState


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


class PlainEngine:
    """Runs a model that is whole on this rank, or cut by anything but a pipeline."""

    def __init__(self, config: RunConfig, state: TrainState) -> None:
        self.config, self.state = config, state
        meshes = state.meshes
        self.device = meshes.device
        self.group: dist.ProcessGroup | None = meshes.group(*TOKENS)
        self.micro_batch = meshes.degrees.micro_batch
        self._layers = [m for part in state.parts for m in part.modules() if isinstance(m, MoE)]

    def train(self, batch: Batch) -> tuple[Tensor, int]:
        """Accumulate the gradients of a whole step's rows of this rank.

        Returns:
            The step's loss per counted label, and how many labels counted, over all ranks.
        """
        batch, total = self._prepared(batch)
        self._balance()
        part, numbers = self.state.parts[0], self._numbers(len(batch.inputs))
        starts = range(0, len(batch.inputs), self.micro_batch)
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        for start in starts:
            if isinstance(part, FSDPModule):
                last = start == starts[-1]
                part.set_requires_gradient_sync(last)
                part.set_is_last_backward(last)
            rows = batch.rows(start, self.micro_batch)
            some = None if numbers is None else numbers[start : start + self.micro_batch]
            with self._context():
                logits = part(rows.inputs, rows.positions, rows.documents, some)
                one = token_loss(logits, rows.labels, total)
                torch.autograd.backward(one * self.state.scale.value)
            loss += one.detach()
        return all_sum(loss, self.group), total

    def evaluate(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the same of any rows, without gradients."""
        batch, total = self._prepared(batch)
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        with torch.no_grad(), self._context():
            for start in range(0, len(batch.inputs), self.micro_batch):
                rows = batch.rows(start, self.micro_batch)
                logits = self.state.parts[0](rows.inputs, rows.positions, rows.documents)
                loss += token_loss(logits, rows.labels, total)
        return all_sum(loss, self.group), total

    def _prepared(self, batch: Batch) -> tuple[Batch, int]:
        """Return this rank's stretch of the rows on its device, and the step's label count."""
        context = self.state.parts[0].model.context
        if context is not None:
            batch = context.part(batch)
        total = max(1, count_labels(batch.labels, self.group))
        return batch.to(self.device), total

    def _numbers(self, count: int) -> Tensor | None:
        """Return the numbers of this rank's rows since the start of the run, if dropout asks."""
        if not (self.config.lora.rank and self.config.lora.dropout):
            return None
        first = self.state.step * self.config.train.batch + self.state.meshes.rank(*DP) * count
        return torch.arange(first, first + count, device=self.device)

    def _balance(self) -> None:
        """Tell the mixture layers how much a row's load balancing loss weighs in this step."""
        model = self.config.model
        share = model.num_hidden_layers * self.config.train.batch * self.state.meshes.degrees.tp
        for layer in self._layers:
            layer.balance = model.router_aux_loss_coef / share * self.state.scale.value

    def _context(self) -> AbstractContextManager[None]:
        return loss_parallel() if self.config.parallel.loss_parallel else nullcontext()
