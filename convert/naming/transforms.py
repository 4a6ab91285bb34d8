"""Named, invertible rearrangements between the tensors of two naming worlds.

``forward`` takes the tensors of the foreign world (Megatron, Meta, ...) and gives those of Hugging
Face, ``inverse`` goes back; both on lazy tensors, so nothing is read. One line of a table names a
transform, its parameters come from the model's ``Sizes``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...shardio.chunked import zeros
from ...shardio.tensor import LazyTensor, concat
from ..movement import (
    deinterleave,
    group_qkv,
    halves,
    interleave,
    rows,
    split_rows,
    stack_experts,
    transpose,
    ungroup_qkv,
    unstack_experts,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What transforms and tables need to know about a model.

    Attributes:
        layers: decoder layers.
        heads, kv_heads, head_dim: attention shape; ``kv_heads`` equals ``heads`` without GQA.
        vocab_size: true vocabulary size.
        padded_vocab_size: rows of the foreign world's embedding.
        experts: routed experts of a MoE layer, 0 without.
        tied: the output layer is the embedding.
        zero_centered_norm: the foreign world stores norm weights minus one.
        rotary_interleaved: the foreign world rotates adjacent rows, Hugging Face rotates halves.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    experts: int = 0
    tied: bool = False
    zero_centered_norm: bool = False
    rotary_interleaved: bool = False


Tensors = Sequence[LazyTensor]
Step = Callable[[Tensors, Sizes], list[LazyTensor]]


@dataclass(frozen=True, slots=True)
class Transform:
    """A rearrangement and its inverse.

    Attributes:
        forward: foreign tensors to Hugging Face tensors.
        inverse: the other way.
        changes_values: does more than move elements, so it holds for weights but not for optimizer
            moments.
        moments: what to do with an optimizer state (``exp_avg``...) instead; None: nothing.
    """

    forward: Step
    inverse: Step
    changes_values: bool = False
    moments: Callable[[str], Transform] | None = None

    def for_moments(self, state: str) -> Transform:
        """The transform of an optimizer state that does not hold the weights' own values."""
        if not self.changes_values:
            return self
        return self.moments(state) if self.moments is not None else TRANSFORMS["same"]


def _shift(delta: float, dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    def add(values: np.ndarray) -> np.ndarray:
        return (values.astype(np.float32) + np.float32(delta)).astype(dtype)

    return add


# -- steps ---------------------------------------------------------------------------------------


def _same(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return list(tensors)


def _transpose(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [transpose(t) for t in tensors]


def _heads(sizes: Sizes) -> tuple[int, int, int]:
    return sizes.heads, sizes.kv_heads, sizes.head_dim


def _join_qkv(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    q, k, v = tensors
    if sizes.rotary_interleaved:
        q, k = interleave(q, sizes.heads), interleave(k, sizes.kv_heads)
    return [group_qkv([q, k, v], *_heads(sizes))]


def _split_qkv(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    q, k, v = ungroup_qkv(tensors[0], *_heads(sizes))
    if sizes.rotary_interleaved:
        q, k = deinterleave(q, sizes.heads), deinterleave(k, sizes.kv_heads)
    return [q, k, v]


def _to_conv_qkv(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [transpose(concat(ungroup_qkv(tensors[0], *_heads(sizes))))]


def _from_conv_qkv(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    d = sizes.head_dim
    widths = [sizes.heads * d, sizes.kv_heads * d, sizes.kv_heads * d]
    return [group_qkv(split_rows(transpose(tensors[0]), widths), *_heads(sizes))]


def _on_columns(step: Step) -> Step:
    """The same on matrices that lie [in, out]."""

    def apply(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        return step(_transpose(tensors, sizes), sizes)

    return apply


def _as_columns(step: Step) -> Step:
    def apply(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        return _transpose(step(tensors, sizes), sizes)

    return apply


def _split_blocks(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    heads, kv_heads, d = _heads(sizes)
    q, k, v = split_rows(tensors[0], [heads * d, kv_heads * d, kv_heads * d])
    if sizes.rotary_interleaved:
        q, k = deinterleave(q, heads), deinterleave(k, kv_heads)
    return [q, k, v]


def _join_blocks(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    q, k, v = tensors
    if sizes.rotary_interleaved:
        q, k = interleave(q, sizes.heads), interleave(k, sizes.kv_heads)
    return [concat([q, k, v])]


def _zero_bias(step: Callable[[LazyTensor], LazyTensor]) -> Transform:
    """A weight without bias -> the weight after ``step``, and a bias of zeros (one per row)."""

    def forward(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        weight = tensors[0]
        return [step(weight), zeros(weight.shape[:1], weight.dtype)]

    def inverse(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        return [step(tensors[0])]

    return Transform(forward, inverse)


def _halves(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return halves(tensors[0])


def _join(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [concat(list(tensors))]


def _trim_vocab(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    n = tensors[0].shape[0]
    if n < sizes.vocab_size:
        raise ValueError(f"{n} rows are fewer than the vocabulary size {sizes.vocab_size}")
    return [rows(tensors[0], 0, sizes.vocab_size)]


def _pad_vocab(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    tensor = tensors[0]
    if tensor.shape[0] != sizes.vocab_size:
        raise ValueError(f"{tensor.shape[0]} rows, the vocabulary size is {sizes.vocab_size}")
    missing = sizes.padded_vocab_size - tensor.shape[0]
    if missing < 0:
        raise ValueError(f"padded vocabulary {sizes.padded_vocab_size} is below its true size")
    if not missing:
        return [tensor]
    return [concat([tensor, zeros((missing, *tensor.shape[1:]), tensor.dtype)])]


def _stack(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [stack_experts(tensors)]


def _unstack(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return unstack_experts(tensors[0], sizes.experts)


def _plus_one(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    if not sizes.zero_centered_norm:
        return list(tensors)
    f32 = np.dtype(np.float32)
    return [t.map(_shift(1.0, f32), f32) for t in tensors]


def _minus_one(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    if not sizes.zero_centered_norm:
        return list(tensors)
    return [t.map(_shift(-1.0, t.dtype), t.dtype) for t in tensors]


def _per_head(step: Callable[[LazyTensor, int], LazyTensor], heads: Callable[[Sizes], int]) -> Step:
    def apply(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        return [step(t, heads(sizes)) for t in tensors]

    return apply


def _q(sizes: Sizes) -> int:
    return sizes.heads


def _k(sizes: Sizes) -> int:
    return sizes.kv_heads


#: name -> transform. Directions: foreign world to Hugging Face.
TRANSFORMS: Mapping[str, Transform] = {
    "same": Transform(_same, _same),
    # [in, out] and [out, in]
    "transpose": Transform(_transpose, _transpose),
    # models without biases, where Hugging Face has no such option
    "same_zero_bias": _zero_bias(lambda t: t),
    "transpose_zero_bias": _zero_bias(transpose),
    # rows [q*r, k, v] per query group -> q, k, v (Megatron)
    "split_qkv": Transform(_split_qkv, _join_qkv),
    # rows [q | k | v] -> q, k, v (nanotron, LitGPT)
    "split_qkv_blocks": Transform(_split_blocks, _join_blocks),
    # grouped rows -> one transposed [q | k | v] (GPT-2's Conv1D)
    "conv_qkv": Transform(_to_conv_qkv, _from_conv_qkv),
    # [gate ; up] -> gate, up
    "split_gate_up": Transform(_halves, _join),
    # the same on [in, out] (PaddleNLP)
    "columns_qkv": Transform(_on_columns(_split_qkv), _as_columns(_join_qkv)),
    "columns_gate_up": Transform(_on_columns(_halves), _as_columns(_join)),
    # padded vocabulary rows -> true ones; padding comes back as zeros
    "trim_vocab": Transform(_trim_vocab, _pad_vocab),
    # adjacent rotary pairs -> rotary halves
    "deinterleave_q": Transform(_per_head(deinterleave, _q), _per_head(interleave, _q)),
    "deinterleave_k": Transform(_per_head(deinterleave, _k), _per_head(interleave, _k)),
    # one tensor per expert -> [experts, ...]
    "stack_experts": Transform(_stack, _unstack),
    # [experts, ...] -> one tensor per expert
    "unstack_experts": Transform(_unstack, _stack),
    # norm weight minus one -> norm weight, where the model stores it so
    "norm": Transform(_plus_one, _minus_one, changes_values=True),
}
