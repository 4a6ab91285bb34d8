"""Rearrangements of lazy tensors that several model worlds need: rotary pairs, fused q|k|v, halves.

All are pure movement: nothing is read, and each has an inverse here. Sizes that do not fit raise
ValueError; callers add the tensor's name. Used by the tables of ``naming/`` (training frameworks)
and ``architectures/`` (GGUF).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..shardio.tensor import LazyTensor, concat


def rows(tensor: LazyTensor, start: int, end: int) -> LazyTensor:
    """Return rows ``start`` to ``end`` (the leading dim)."""
    return tensor.slice([slice(start, end)])


def split_rows(tensor: LazyTensor, widths: Sequence[int]) -> list[LazyTensor]:
    """Cut the leading dim into parts. Raises ValueError when they do not add up."""
    return split(tensor, widths, 0)


def split(tensor: LazyTensor, widths: Sequence[int], axis: int) -> list[LazyTensor]:
    """Cut a dim (negative: from the end) into parts.

    Raises:
        ValueError: they do not add up.
    """
    axis %= tensor.ndim
    if sum(widths) != tensor.shape[axis]:
        raise ValueError(f"{tensor.shape[axis]} rows, expected {' + '.join(map(str, widths))}")
    ends = [sum(widths[: k + 1]) for k in range(len(widths))]
    before = [slice(None)] * axis
    return [tensor.slice([*before, slice(e - w, e)]) for e, w in zip(ends, widths, strict=True)]


def halves(tensor: LazyTensor, axis: int = 0) -> list[LazyTensor]:
    """Cut a dim into two equal parts. Raises ValueError when it is odd."""
    n = tensor.shape[axis]
    if n % 2:
        raise ValueError(f"{n} rows do not divide into gate and up")
    return split(tensor, [n // 2, n // 2], axis)


def transpose(tensor: LazyTensor) -> LazyTensor:
    """Swap the last two dims; vectors stay (the biases beside transposed weights)."""
    if tensor.ndim < 2:
        return tensor
    return tensor.permute((*range(tensor.ndim - 2), tensor.ndim - 1, tensor.ndim - 2))


def interleave(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Reorder the rows of each head from (half, pair) to (pair, half): rotary pairs adjacent.

    Works for weights and biases.

    Raises:
        ValueError: the rows do not divide into heads of two halves.
    """
    return _swap_inner(tensor, heads, 2)


def deinterleave(tensor: LazyTensor, heads: int) -> LazyTensor:
    """The inverse of ``interleave``: (pair, half) to (half, pair)."""
    return _swap_inner(tensor, heads, tensor.shape[0] // heads // 2 if heads else 0)


def _swap_inner(tensor: LazyTensor, heads: int, outer: int) -> LazyTensor:
    n, rest = tensor.shape[0], tensor.shape[1:]
    if not heads or not outer or n % (heads * outer) or n % (2 * heads):
        raise ValueError(f"{n} rows do not divide into {heads} heads of two halves")
    view = tensor.reshape((heads, outer, n // heads // outer, *rest))
    axes = (0, 2, 1, *range(3, 3 + len(rest)))
    return view.permute(axes).reshape(tensor.shape)


def ungroup_qkv(qkv: LazyTensor, heads: int, kv_heads: int, head_dim: int) -> list[LazyTensor]:
    """Split rows [q*r, k, v] of each query group into q, k and v, heads in order.

    Raises:
        ValueError: the rows are not (heads + 2 * kv_heads) * head_dim.
    """
    if heads % kv_heads or qkv.shape[0] != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"{qkv.shape[0]} rows do not hold {heads} query heads and 2 x {kv_heads} key/value "
            f"heads of {head_dim} rows"
        )
    parts = split_rows(qkv, [heads // kv_heads * head_dim, head_dim, head_dim] * kv_heads)
    return [concat(parts[k::3]) for k in range(3)]


def group_qkv(parts: Sequence[LazyTensor], heads: int, kv_heads: int, head_dim: int) -> LazyTensor:
    """The inverse of ``ungroup_qkv``. Raises ValueError when shapes do not fit."""
    widths = [heads // kv_heads * head_dim, head_dim, head_dim]
    q, k, v = (split_rows(p, [w] * kv_heads) for p, w in zip(parts, widths, strict=True))
    return concat([piece for group in zip(q, k, v, strict=True) for piece in group])


def stack_experts(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Return equal-shaped tensors along a new leading dim. Raises ValueError when they differ."""
    return concat([t.reshape((1, *t.shape)) for t in tensors])


def unstack_experts(tensor: LazyTensor, count: int) -> list[LazyTensor]:
    """Return the ``count`` parts of a stack, also of one whose first two dims were merged.

    Raises:
        ValueError: the stack does not hold so many.
    """
    if not count or tensor.shape[0] != count:
        raise ValueError(f"{tensor.shape[0]} stacked experts, expected {count}")
    return [rows(tensor, e, e + 1).reshape(tensor.shape[1:]) for e in range(count)]
