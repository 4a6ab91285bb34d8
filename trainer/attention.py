"""Causal self-attention: norms, rotary positions, grouped queries, masks, shared sequences.

The rotary order is Hugging Face's (halves, not pairs). The arithmetic is that of ``transformers``;
the attention itself is ``scaled_dot_product_attention``. Under tensor parallelism a rank has some
of the heads; what all its ranks hold whole is a ``DTensor`` with placement ``Replicate``, used as a
plain tensor.

Under context parallelism a rank has a stretch of every row: keys and values of the whole row are
gathered, which the ranks' queries share out. The gathering is a ``DTensor`` redistribution: its
gradient, a reduce scatter, comes with it. It works on every backend and with every mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional

from .batch import Batch
from .settings.model import ModelConfig, RopeScaling


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


def rotary(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Return [2, rows, 1, seq, head_dim]: cosines and sines of int64 ``positions`` [rows, seq]."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)
    if config.rope_scaling is not None:
        frequencies = _stretched(frequencies, config.rope_scaling)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), -1)[:, None]
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def _stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Stretch all frequencies, or (Llama 3.1) the low ones fully and those between partly."""
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn ``x`` [rows, heads, seq, head_dim] by its positions; dim i pairs with i + head_dim/2."""
    first, second = x.chunk(2, -1)
    return x * table[0] + torch.cat((-second, first), -1) * table[1]


def attention_mask(
    config: ModelConfig, queries: int, context: Context | None, documents: Tensor | None
) -> Tensor | None:
    """Return bool [rows or 1, 1, queries, keys]: who sees whom; None for plain causality.

    Args:
        config: with the sliding window, if any.
        queries: number of queries of this rank.
        context: None when the rank has whole rows.
        documents: int64 [rows, keys], of whole rows.
    """
    keys = queries * (context.size if context else 1)
    window = config.sliding_window or keys
    if documents is None and context is None and window >= keys:
        return None
    device = documents.device if documents is not None else context.device if context else None
    first = context.rank * queries if context else 0
    at = torch.arange(first, first + queries, device=device)[:, None]
    of = torch.arange(keys, device=device)[None, :]
    mask = ((of <= at) & (at - of < window))[None, None]
    if documents is not None:
        mine = documents[:, first : first + queries]
        mask = mask & (mine[:, None, :, None] == documents[:, None, None, :])
    return mask


class Attention(nn.Module):
    """Causal self-attention in which several query heads share a key-value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.context: Context | None = None
        hidden, bias = config.hidden_size, config.attention_bias or config.family.qkv_bias
        queries = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, shared, bias=bias)
        self.v_proj = nn.Linear(hidden, shared, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.attention_bias)
        if config.family.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.normed = config.family.qk_norm

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (self._heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (
            rotate(q.transpose(1, 2), table),
            rotate(k.transpose(1, 2), table),
            v.transpose(1, 2),
        )
        if self.context is not None:
            k, v = self.context.gather(k), self.context.gather(v)
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[rows, seq, heads * head_dim] to [rows, seq, heads, head_dim]."""
        return x.view(*x.shape[:-1], -1, self.head_dim)
