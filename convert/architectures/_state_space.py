"""Transforms of state-space layers and linear attention (Mamba, Qwen3-Next, Qwen3.5).

``A`` is stored as a logarithm of its negative; convolutions carry a dim of one. Linear attention
has more value heads than key heads: Hugging Face keeps the value heads of a key head together,
llama.cpp repeats the key heads as a whole, so value heads are brought into that order. Sizes:
``key_heads``, ``key_head``, ``value_heads``, ``value_head`` (linear attention), ``groups`` (Mamba
2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...shardio.tensor import LazyTensor, concat
from ..movement import split, split_rows

Tensors = Sequence[LazyTensor]
Sizes = Mapping[str, int]
Step = Callable[[Tensors, Sizes], list[LazyTensor]]

_FLOAT16 = np.dtype(np.float16)
_FLOAT32 = np.dtype(np.float32)


def negative_exp(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """``-exp(x)``, correctly rounded; in half precision where the values are."""
    return [_mapped(t, _negative_exp) for t in tensors]


def negative_log(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """The inverse of ``negative_exp``."""
    return [_mapped(t, _negative_log) for t in tensors]


def _mapped(tensor: LazyTensor, function: Callable[[np.ndarray], np.ndarray]) -> LazyTensor:
    kind = _FLOAT16 if tensor.dtype == _FLOAT16 else _FLOAT32
    return tensor.cast(kind).map(function, kind)


def _negative_exp(values: np.ndarray) -> np.ndarray:
    wide: np.ndarray = -np.exp(values.astype(np.float64))
    return wide.astype(values.dtype)


def _negative_log(values: np.ndarray) -> np.ndarray:
    wide: np.ndarray = np.log(-values.astype(np.float64))
    return wide.astype(values.dtype)


def squeeze(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """[channels, 1, kernel] to [channels, kernel]. Raises ValueError when the 1 is another."""
    out = []
    for t in tensors:
        if t.ndim != 3 or t.shape[1] != 1:
            raise ValueError(
                f"a convolution of shape {list(t.shape)}, [channels, 1, kernel] needed"
            )
        out.append(t.reshape((t.shape[0], t.shape[2])))
    return out


def unsqueeze(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """The inverse of ``squeeze``."""
    return [t.reshape((t.shape[0], 1, t.shape[1])) for t in tensors]


def column(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """[n] to [n, 1]."""
    return [t.reshape((*t.shape, 1)) for t in tensors]


def flat(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """Any shape to one dim."""
    return [t.reshape((t.size,)) for t in tensors]


def by_group(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """[n] to [groups, n / groups]."""
    return [t.reshape((sizes["groups"], t.size // sizes["groups"])) for t in tensors]


def tiled(width: str, axis: int = 0, *, back: bool = False) -> Step:
    """Return the step that brings value heads into llama.cpp's order.

    Args:
        width: name of the size of a head on that axis; empty: one.
        axis: the axis, all of which is value heads.
        back: the other way.
    """

    def step(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        return [_tiled(t, sizes, sizes[width] if width else 1, axis, back) for t in tensors]

    return step


def _tiled(tensor: LazyTensor, sizes: Sizes, width: int, axis: int, back: bool) -> LazyTensor:
    keys, ratio = sizes["key_heads"], sizes["value_heads"] // sizes["key_heads"]
    before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
    inner = (ratio, keys, width) if back else (keys, ratio, width)
    view = tensor.reshape((*before, *inner, *after))
    order = [*range(view.ndim)]
    order[axis], order[axis + 1] = order[axis + 1], order[axis]
    return view.permute(order).reshape(tensor.shape)


def tiled_values(*, back: bool = False) -> Step:
    """Return the same step for rows of which only the last are value heads (q, k, v)."""

    def step(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
        keys = 2 * sizes["key_heads"] * sizes["key_head"]
        values = sizes["value_heads"] * sizes["value_head"]
        out = []
        for t in tensors:
            rest, heads = split_rows(t, [keys, values])
            out.append(concat([rest, _tiled(heads, sizes, sizes["value_head"], 0, back)]))
        return out

    return step


def split_qkvz(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """Rows [q, k, v.., z..] per key head to q|k|v and z, each head after head."""
    keys, columns = sizes["key_heads"], tensors[0].shape[-1]
    view = tensors[0].reshape((keys, tensors[0].shape[0] // keys, columns))
    parts = [part.reshape((part.size // columns, columns)) for part in split(view, _qkvz(sizes), 1)]
    return [concat(parts[:3]), parts[3]]


def join_qkvz(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """The inverse of ``split_qkvz``."""
    keys, columns, widths = sizes["key_heads"], tensors[0].shape[-1], _qkvz(sizes)
    parts = [*split_rows(tensors[0], [keys * w for w in widths[:3]]), tensors[1]]
    views = [p.reshape((keys, w, columns)) for p, w in zip(parts, widths, strict=True)]
    joined = concat(views, 1)
    return [joined.reshape((joined.shape[0] * joined.shape[1], columns))]


def _qkvz(sizes: Sizes) -> list[int]:
    values = sizes["value_heads"] // sizes["key_heads"] * sizes["value_head"]
    return [sizes["key_head"], sizes["key_head"], values, values]
