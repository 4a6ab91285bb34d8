"""Causal self-attention: rotary positions, grouped queries, masks of documents and windows.

The rotary order is Hugging Face's (halves, not pairs). The arithmetic is that of ``transformers``;
the attention itself is ``scaled_dot_product_attention``. Under tensor parallelism a rank has some
of the heads, under context parallelism some of the queries and all keys (``context.py``).
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional

from .context import Context
from .model_config import ModelConfig, RopeScaling
from .norm import RMSNorm


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
