"""Named, invertible rearrangements between the tensors of two naming worlds.

``forward`` takes the tensors of the foreign world (Megatron, Meta, ...) and gives those of Hugging
Face, ``inverse`` goes back; both on lazy tensors, so nothing is read. One line of a table names a
transform, its parameters come from the model's ``Sizes``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ...shardio.chunked import Chunked
from ...shardio.source import MemorySource
from ...shardio.tensor import LazyTensor, concat, from_array


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
    """

    forward: Step
    inverse: Step
    changes_values: bool = False


# -- pieces --------------------------------------------------------------------------------------


def rows(tensor: LazyTensor, start: int, end: int) -> LazyTensor:
    """Return rows ``start`` to ``end`` (the leading dim)."""
    return tensor.slice([slice(start, end)])


def split_rows(tensor: LazyTensor, widths: Sequence[int]) -> list[LazyTensor]:
    """Cut the leading dim into parts. Raises ValueError when they do not add up."""
    if sum(widths) != tensor.shape[0]:
        raise ValueError(f"{tensor.shape[0]} rows, expected {' + '.join(map(str, widths))}")
    ends = [sum(widths[: k + 1]) for k in range(len(widths))]
    return [rows(tensor, e - w, e) for e, w in zip(ends, widths, strict=True)]


def zeros(shape: Sequence[int], dtype: np.dtype) -> LazyTensor:
    """Return a lazy tensor of zeros that holds one element in memory."""
    one = from_array(np.zeros(1, dtype), "zeros")
    assert isinstance(one, Chunked)
    source = one.chunks[0].source
    assert isinstance(source, MemorySource)
    return Chunked.strided(source, 0, shape, [0] * len(shape), np.dtype(dtype))


def transpose(tensor: LazyTensor) -> LazyTensor:
    """Swap the dims of a matrix; vectors stay (the biases beside transposed weights)."""
    return tensor.permute((1, 0)) if tensor.ndim == 2 else tensor


def ungroup_qkv(qkv: LazyTensor, sizes: Sizes) -> list[LazyTensor]:
    """Split rows [q*r, k, v] of each query group into q, k and v, heads in order.

    Raises:
        ValueError: the rows are not (heads + 2 * kv_heads) * head_dim.
    """
    groups, d = sizes.kv_heads, sizes.head_dim
    if sizes.heads % groups or qkv.shape[0] != (sizes.heads + 2 * groups) * d:
        raise ValueError(
            f"{qkv.shape[0]} rows do not hold {sizes.heads} query heads and 2 x {groups} key/value "
            f"heads of {d} rows"
        )
    parts = split_rows(qkv, [sizes.heads // groups * d, d, d] * groups)
    return [concat(parts[k::3]) for k in range(3)]


def group_qkv(parts: Tensors, sizes: Sizes) -> LazyTensor:
    """The inverse of ``ungroup_qkv``. Raises ValueError when shapes do not fit."""
    groups, d = sizes.kv_heads, sizes.head_dim
    widths = [sizes.heads // groups * d, d, d]
    q, k, v = (split_rows(p, [w] * groups) for p, w in zip(parts, widths, strict=True))
    return concat([piece for group in zip(q, k, v, strict=True) for piece in group])


def interleave(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Reorder the rows of each head from (half, pair) to (pair, half): rotary pairs adjacent.

    Raises:
        ValueError: the rows do not divide into heads of two halves.
    """
    return _swap_inner(tensor, heads, 2)


def deinterleave(tensor: LazyTensor, heads: int) -> LazyTensor:
    """The inverse of ``interleave``: (pair, half) to (half, pair)."""
    return _swap_inner(tensor, heads, tensor.shape[0] // heads // 2)


def _swap_inner(tensor: LazyTensor, heads: int, outer: int) -> LazyTensor:
    n, rest = tensor.shape[0], tensor.shape[1:]
    if not heads or not outer or n % (heads * outer) or n % (2 * heads):
        raise ValueError(f"{n} rows do not divide into {heads} heads of two halves")
    view = tensor.reshape((heads, outer, n // heads // outer, *rest))
    axes = (0, 2, 1, *range(3, 3 + len(rest)))
    return view.permute(axes).reshape(tensor.shape)


def _shift(delta: float, dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    def add(values: np.ndarray) -> np.ndarray:
        return (values.astype(np.float32) + np.float32(delta)).astype(dtype)

    return add


# -- steps ---------------------------------------------------------------------------------------


def _same(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return list(tensors)


def _transpose(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [transpose(t) for t in tensors]


def _join_qkv(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    q, k, v = tensors
    if sizes.rotary_interleaved:
        q, k = interleave(q, sizes.heads), interleave(k, sizes.kv_heads)
    return [group_qkv([q, k, v], sizes)]


def _split_qkv(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    q, k, v = ungroup_qkv(tensors[0], sizes)
    if sizes.rotary_interleaved:
        q, k = deinterleave(q, sizes.heads), deinterleave(k, sizes.kv_heads)
    return [q, k, v]


def _to_conv_qkv(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [transpose(concat(ungroup_qkv(tensors[0], sizes)))]


def _from_conv_qkv(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    d = sizes.head_dim
    widths = [sizes.heads * d, sizes.kv_heads * d, sizes.kv_heads * d]
    return [group_qkv(split_rows(transpose(tensors[0]), widths), sizes)]


def _zero_bias(step: Callable[[LazyTensor], LazyTensor]) -> Transform:
    """A weight without bias -> the weight after ``step``, and a bias of zeros (one per row)."""

    def forward(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        weight = tensors[0]
        return [step(weight), zeros(weight.shape[:1], weight.dtype)]

    def inverse(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        return [step(tensors[0])]

    return Transform(forward, inverse)


def _halves(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    n = tensors[0].shape[0]
    if n % 2:
        raise ValueError(f"{n} rows do not divide into gate and up")
    return split_rows(tensors[0], [n // 2, n // 2])


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
    return [concat([t.reshape((1, *t.shape)) for t in tensors])]


def _unstack(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    whole = tensors[0]
    rest = whole.shape[1:]
    if prod(rest) * sizes.experts != whole.size:
        raise ValueError(f"{whole.shape[0]} stacked experts, expected {sizes.experts}")
    return [rows(whole, e, e + 1).reshape(rest) for e in range(sizes.experts)]


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
    # the same -> one transposed [q | k | v] (GPT-2's Conv1D)
    "conv_qkv": Transform(_to_conv_qkv, _from_conv_qkv),
    # [gate ; up] -> gate, up
    "split_gate_up": Transform(_halves, _join),
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
