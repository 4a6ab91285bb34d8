"""Composable rearrangements for frameworks that keep weights as JAX and TensorFlow do.

Kernels lie [in, out] or [in, heads, head_dim], layers may be stacked along a dim, query weights may
be scaled. Each function returns a ``Transform`` from the foreign tensors to Hugging Face's;
``chain`` and ``layers`` put them together. Nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ...shardio.tensor import LazyTensor, concat
from ..movement import deinterleave, interleave, split, transpose
from .transforms import TRANSFORMS, Sizes, Step, Tensors, Transform

Number = Callable[[Sizes], float]
Heads = Callable[[Sizes], int]


def q_heads(sizes: Sizes) -> int:
    """Query heads."""
    return sizes.heads


def kv_heads(sizes: Sizes) -> int:
    """Key/value heads."""
    return sizes.kv_heads


def named(how: str | Transform) -> Transform:
    """Return the transform of a name in a table, or the transform itself."""
    return TRANSFORMS[how] if isinstance(how, str) else how


def chain(*parts: str | Transform) -> Transform:
    """One after the other; the inverse goes back through them."""
    steps = [named(p) for p in parts]

    def forward(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        found = list(tensors)
        for step in steps:
            found = step.forward(found, sizes)
        return found

    def inverse(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        found = list(tensors)
        for step in reversed(steps):
            found = step.inverse(found, sizes)
        return found

    if not any(s.changes_values for s in steps):
        return Transform(forward, inverse)
    return Transform(
        forward, inverse, True, lambda state: chain(*(s.for_moments(state) for s in steps))
    )


def each(
    step: Callable[[LazyTensor, Sizes], LazyTensor], back: Callable[[LazyTensor, Sizes], LazyTensor]
) -> Transform:
    """A rearrangement of single tensors."""

    def over(one: Callable[[LazyTensor, Sizes], LazyTensor]) -> Step:
        return lambda tensors, sizes: [one(t, sizes) for t in tensors]

    return Transform(over(step), over(back))


def layers(axis: int, count: int, inner: str | Transform = "same") -> Transform:
    """One tensor with all layers along ``axis`` -> the tensors of each layer, by ``inner``."""
    step = named(inner)

    def forward(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        return [t for part in unstack(tensors[0], axis, count) for t in step.forward([part], sizes)]

    def inverse(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        each_has = len(tensors) // count
        groups = [tensors[i * each_has : (i + 1) * each_has] for i in range(count)]
        return [restack([step.inverse(g, sizes)[0] for g in groups], axis)]

    if not step.changes_values:
        return Transform(forward, inverse)
    return Transform(
        forward, inverse, True, lambda state: layers(axis, count, step.for_moments(state))
    )


def unstack(tensor: LazyTensor, axis: int, count: int) -> list[LazyTensor]:
    """Return the slices along a dim, without it. Raises ValueError when they are not so many."""
    if axis >= tensor.ndim or tensor.shape[axis] != count:
        raise ValueError(f"dim {axis} does not hold {count} layers or experts")
    shape = (*tensor.shape[:axis], *tensor.shape[axis + 1 :])
    return [part.reshape(shape) for part in split(tensor, [1] * count, axis)]


def restack(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """The inverse of ``unstack``."""
    wide = [t.reshape((*t.shape[:axis], 1, *t.shape[axis:])) for t in tensors]
    return concat(wide, axis)


def _experts_apart(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [transpose(t) for t in unstack(tensors[0], 0, sizes.experts)]


def _experts_together(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [restack([transpose(t) for t in tensors], 0)]


#: [experts, in, out] -> one [out, in] per expert
EXPERTS = Transform(_experts_apart, _experts_together)


def _check_heads(tensor: LazyTensor, dim: int, sizes: Sizes) -> None:
    if tensor.ndim != 3 or tensor.shape[dim] != sizes.head_dim:
        raise ValueError(f"dim {dim} is not the head_dim {sizes.head_dim} of the config")


def _flat_in(tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
    """[in, heads, head_dim] -> [heads * head_dim, in]."""
    _check_heads(tensor, 2, sizes)
    return transpose(tensor.reshape((tensor.shape[0], -1)))


def _flat_out(tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
    """[heads, head_dim, out] -> [out, heads * head_dim]."""
    _check_heads(tensor, 1, sizes)
    return transpose(tensor.reshape((-1, tensor.shape[-1])))


def _headed_in(tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
    return transpose(tensor).reshape((tensor.shape[1], -1, sizes.head_dim))


def _headed_out(tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
    return transpose(tensor).reshape((-1, sizes.head_dim, tensor.shape[0]))


#: projections into and out of heads, and their biases
INTO_HEADS = each(_flat_in, _headed_in)
OUT_OF_HEADS = each(_flat_out, _headed_out)
HEAD_BIAS = each(
    lambda t, sizes: t.reshape((-1,)), lambda t, sizes: t.reshape((-1, sizes.head_dim))
)


def _einsum_in(tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
    """[heads, in, head_dim] -> [heads * head_dim, in]."""
    _check_heads(tensor, 2, sizes)
    return transpose(tensor).reshape((-1, tensor.shape[1]))


def _einsum_back(tensor: LazyTensor, sizes: Sizes) -> LazyTensor:
    return transpose(tensor.reshape((-1, sizes.head_dim, tensor.shape[1])))


#: the same with the heads in front, as einsums have them
HEADS_FIRST = each(_einsum_in, _einsum_back)


def rotary(heads: Heads) -> Transform:
    """Rows with adjacent rotary pairs -> rows with halves."""
    return each(
        lambda t, sizes: deinterleave(t, heads(sizes)), lambda t, sizes: interleave(t, heads(sizes))
    )


def parts(inner: str | Transform, axis: int = 0, count: int = 2) -> Transform:
    """One tensor that holds ``count`` along ``axis`` -> those, each by ``inner``."""
    return layers(axis, count, inner)


def _times(factor: float, dtype: np.dtype, values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32) * np.float32(factor)).astype(dtype)


def scaled(factor: Number) -> Transform:
    """Weights times ``factor``; moments are divided by it, as the gradient is."""

    def by(power: int) -> Step:
        def apply(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
            value = factor(sizes) ** power
            return [t.map(partial(_times, value, t.dtype), t.dtype) for t in tensors]

        return apply

    powers = {"exp_avg": -1, "exp_avg_sq": -2}

    def moments(state: str) -> Transform:
        power = powers.get(state, 1)
        return Transform(by(power), by(-power))

    return Transform(by(1), by(-1), True, moments)


def trimmed(how: str | Transform = "same") -> Transform:
    """Vocabulary rows without padding, after ``how``."""
    return chain(how, "trim_vocab")
