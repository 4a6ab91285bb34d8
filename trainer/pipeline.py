"""Pipeline parallelism: stages, torch's schedules, and embeddings tied across stages.

A stage is a ``Decoder`` with some of the layers, under their own names. Which ranks have which
stages is the schedule's: in turn, or (``ZBVZeroBubble``, ``DualPipeV``) in turn and back.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)
from torch.distributed.tensor import DTensor

from .batch import Batch
from .engine import PlainEngine, all_sum, token_loss
from .model import Decoder
from .optim import settle
from .settings import RunConfig
from .settings.degrees import Degrees
from .settings.model import ModelConfig
from .state import TrainState

_VEES = ("ZBVZeroBubble", "DualPipeV")


def stage_indices(rank: int, degrees: Degrees, schedule: str) -> list[int]:
    """Return which stages pipeline rank ``rank`` has, in order."""
    if degrees.pp > 1 and schedule in _VEES:
        return [rank, 2 * degrees.pp - 1 - rank]
    return [rank + n * degrees.pp for n in range(degrees.stages)]


def split_layers(config: ModelConfig, stages: int) -> list[range]:
    """Return the layers of each stage: about the same work for all, the head's included."""
    inner = config.intermediate_size
    if config.num_experts:
        inner = config.moe_intermediate_size * config.num_experts_per_tok
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    head = config.vocab_size / (heads + 3 * inner)  # in layers
    layers, ends = config.num_hidden_layers, [0]
    for stage in range(1, stages):
        wanted = round(stage * (layers + head) / stages)
        ends.append(min(max(wanted, ends[-1] + 1), layers - (stages - stage)))
    return [range(a, b) for a, b in pairwise([*ends, layers])]


def build_parts(config: RunConfig, degrees: Degrees, rank: int) -> list[Decoder]:
    """Return the model parts of pipeline rank ``rank``, in the order of their layers."""
    stages = degrees.pp * degrees.stages
    cuts = split_layers(config.model, stages)
    return [
        Decoder(config.model, cuts[i], first=i == 0, last=i == stages - 1)
        for i in stage_indices(rank, degrees, config.parallel.schedule)
    ]


class PipelineEngine(PlainEngine):
    """Runs this rank's stages as one of torch's schedules says."""

    def __init__(self, config: RunConfig, state: TrainState) -> None:
        super().__init__(config, state)
        meshes, degrees = state.meshes, state.meshes.degrees
        group = meshes.group("pp")
        assert group is not None
        self.pipeline = group
        self.rank, self.ranks = meshes.rank("pp"), degrees.pp
        self.vee = config.parallel.schedule in _VEES
        self._total = 1.0
        indices = stage_indices(self.rank, degrees, config.parallel.schedule)
        stages = [
            PipelineStage(part, index, degrees.pp * degrees.stages, self.device, group=group)
            for index, part in zip(indices, state.parts, strict=True)
        ]
        kind = get_schedule_class(config.parallel.schedule)
        self.schedule: PipelineScheduleSingle | PipelineScheduleMulti = kind(
            stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
            degrees.micro_batches,
            loss_fn=lambda logits, labels: token_loss(logits, labels, self._total),
            scale_grads=False,
        )

    def train(self, batch: Batch) -> tuple[Tensor, int]:
        """Run the schedule on a step's rows."""
        rows = len(batch.inputs)
        batch, total = self._prepared(batch)
        self._balance()
        with self._context():
            losses = self._run(batch, total / self.state.scale.value, self._numbers(rows))
        self._sync_tied()
        loss = self._everywhere(losses) / self.state.scale.value
        return loss, total

    def evaluate(self, batch: Batch) -> tuple[Tensor, int]:
        """Run the schedule forward; as many rows as a step has.

        Schedules in turn and back have no forward-only run in torch 2.13: theirs goes both ways,
        and the gradients are dropped.
        """
        batch, total = self._prepared(batch)
        with torch.set_grad_enabled(self.vee), self._context():
            losses = self._run(batch, float(total), None, backward=self.vee)
        if self.vee:
            for _, parameter in self.state.all_parameters():
                parameter.grad = None
        return self._everywhere(losses), total

    def _run(
        self, batch: Batch, total: float, numbers: Tensor | None, backward: bool = True
    ) -> list[Tensor]:
        """Return the losses of the micro-batches, if this rank has the last stage."""
        self._total = total
        inputs = [batch.inputs] if any(part.first for part in self.state.parts) else []
        target = batch.labels if any(part.last for part in self.state.parts) else None
        extra = {"positions": batch.positions, "documents": batch.documents, "numbers": numbers}
        more: dict[str, Any] = {name: value for name, value in extra.items() if value is not None}
        losses: list[Tensor] = []
        if backward:
            self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False, **more)
        else:
            self.schedule.eval(*inputs, target=target, losses=losses, **more)
        return losses

    def _everywhere(self, losses: list[Tensor]) -> Tensor:
        """Return the loss, which only the last stage's rank computed, on all ranks."""
        none = torch.zeros((), device=self.device, dtype=torch.float64)
        loss = torch.stack([none, *(one.detach().double() for one in losses)]).sum()
        return all_sum(all_sum(loss, self.group), self.pipeline)

    def _sync_tied(self) -> None:
        """Give the embedding and the last stage's copy of it the sum of both gradients."""
        if not self.config.model.tie_word_embeddings:
            return
        ends: list[Tensor] = []
        for part in self.state.parts:
            ends += [part.model.embed_tokens.weight] if part.first else []
            ends += [part.lm_head.weight] if part.last else []
        grads = [g.to_local() if isinstance(g, DTensor) else g for g in settle(ends)]
        if self.vee and grads:
            total = grads[0] + grads[1]
            for grad in grads:
                grad.copy_(total)
        elif grads:
            self._add_other(grads[0], 0 if self.rank else self.ranks - 1)

    def _add_other(self, grad: Tensor, peer: int) -> None:
        """Add the gradient that pipeline rank ``peer`` has to this one's."""
        theirs = torch.empty_like(grad)
        mine = grad.contiguous()
        peer = dist.get_global_rank(self.pipeline, peer)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, mine, peer, self.pipeline),
                dist.P2POp(dist.irecv, theirs, peer, self.pipeline),
            ]
        )
        for work in works:
            work.wait()
        grad.add_(theirs)
