"""Mixture of experts: router, stacked experts, expert parallelism, the load balancing loss.

Experts are stacked into 3-D parameters, as fast kernels want them; ``expert_names`` says which
Hugging Face tensors a stack holds. Under expert parallelism a rank has some of the experts: tokens
travel there and back with two all-to-alls, whose gradients torch knows.

The load balancing loss is taken per sequence (as in DeepSeek-V3), not per batch: a sum over
sequences is the same under every layout, a product of batch means is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional

from .attention import Context, local
from .settings.model import ModelConfig

_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def expert_names(config: ModelConfig, name: str) -> list[str] | None:
    """Return the Hugging Face names of a stack's experts, in order; None for any other parameter.

    ``....experts.gate_proj`` [experts, out, in] holds ``....experts.N.gate_proj.weight`` [out, in].
    """
    head, _, kind = name.rpartition(".")
    if not head.endswith(".experts") or kind not in _MIXTRAL:
        return None
    kind = _MIXTRAL[kind] if config.model_type == "mixtral" else kind
    return [f"{head}.{n}.{kind}.weight" for n in range(config.num_experts)]


class Router(nn.Module):
    """Scores of tokens for experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, local(self.weight, partial=True))


class Experts(nn.Module):
    """SwiGLU experts, stacked: ``down(act(gate(x)) * up(x))``, each for its own tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, hidden, inner = (
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        self.gate_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Apply expert n to the n-th run of ``x`` [tokens, hidden], of ``counts[n]`` tokens."""
        ends = counts.cumsum(0).to(torch.int32)
        return _grouped(self.inner(x, counts), local(self.down_proj), ends)

    def inner(self, x: Tensor, counts: Tensor) -> Tensor:
        """Return what the down projections get, [tokens, inner]."""
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = local(self.gate_proj), local(self.up_proj)
        return functional.silu(_grouped(x, gate, ends)) * _grouped(x, up, ends)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply runs of ``x`` [tokens, in], which end at ``ends``, by ``weight`` [n, out, in]."""
    aligned = all(size * x.itemsize % 16 == 0 for size in weight.shape[1:])
    if x.dtype in (torch.float32, torch.bfloat16) and aligned:
        return functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = zip(torch.split(x, sizes), weight.unbind(), strict=True)
    return torch.cat([functional.linear(part, one) for part, one in parts])


class MoE(nn.Module):
    """A feed-forward layer in which each token chooses some experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.top, self.norm = config.num_experts_per_tok, config.norm_topk_prob
        self.mesh: DeviceMesh | None = None  # ranks that share the experts
        self.context: Context | None = None  # None when the rank has whole rows
        self.balance = 0.0  # weight of this layer's load balancing loss, over the rows of a step

    def forward(self, x: Tensor) -> Tensor:
        """[rows, seq, hidden] to the same; under tensor parallelism a part of the sum."""
        if isinstance(x, DTensor):
            x = x.to_local(grad_placements=[Partial()])
        flat = x.flatten(0, 1)
        scores = self.gate(flat)
        odds = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights, chosen = odds.topk(self.top, -1)
        if self.norm:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # by expert
        counts = chosen.new_zeros(odds.shape[-1]).scatter_add(
            0, chosen.flatten(), torch.ones_like(chosen.flatten())
        )
        done = self._apply_experts(flat[order // self.top], counts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        done = done[back].view(len(flat), self.top, -1)
        out = (done * weights.to(done.dtype)[..., None]).sum(1).view_as(x)
        if self.balance and torch.is_grad_enabled():
            shape = (*x.shape[:2], -1)
            out = _AddLoss.apply(  # type: ignore[no-untyped-call]  # torch
                out, self.balance * self._imbalance(odds.view(shape), chosen)
            )
        return out

    def _apply_experts(self, x: Tensor, counts: Tensor) -> Tensor:
        """Apply the experts to tokens sorted by expert, wherever these are."""
        if self.mesh is None:
            return self.experts(x, counts)
        group, ranks = self.mesh.get_group(), self.mesh.size()
        theirs = all_to_all_single(counts, None, None, group).view(ranks, -1)
        sent = counts.view(ranks, -1).sum(1).tolist()
        received = theirs.sum(1).tolist()
        x = all_to_all_single_autograd(x.contiguous(), received, sent, group)
        # runs come by rank, then expert; the experts want them by expert, then rank
        experts = torch.arange(theirs.shape[1], device=x.device).repeat(ranks)
        order = experts.repeat_interleave(theirs.flatten()).argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        done = self.experts(x[order], theirs.sum(0))[back]
        return all_to_all_single_autograd(done.contiguous(), sent, received, group)

    def _imbalance(self, odds: Tensor, chosen: Tensor) -> Tensor:
        """Return sum over rows of experts * sum(share of choices * mean probability).

        Args:
            odds: [rows, seq, experts].
            chosen: int64 [rows * seq, top].
        """
        rows, seq, experts = odds.shape
        counts = odds.new_zeros(rows, experts)
        picks = chosen.view(rows, -1)
        counts.scatter_add_(1, picks, torch.ones_like(picks, dtype=odds.dtype))
        if self.context is not None:
            counts, seq = self.context.total(counts), seq * self.context.size
        return experts * (counts / (seq * self.top) * (odds.sum(1) / seq)).sum()


class _AddLoss(torch.autograd.Function):
    """Returns its first argument, and has the gradient of a loss to which the second was added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)
