"""Named, invertible rearrangements between Hugging Face and GGUF tensors.

``apply`` takes the tensors of Hugging Face that one rule names (several for a stack of experts) and
gives those of GGUF (several for a fused tensor that is cut); ``undo`` goes back. Nothing is read.
Sizes are those of ``_record.dimensions``. Sizes that do not fit raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...shardio import from_array
from ...shardio.tensor import LazyTensor, concat
from ..gguf.tensors import BlockTensor
from ..movement import (
    deinterleave,
    group_qkv,
    halves,
    interleave,
    split,
    split_rows,
    stack_experts,
    transpose,
    ungroup_qkv,
    unstack_experts,
)
from ..mxfp4 import pack_mxfp4, unpack_mxfp4
from . import _state_space as state
from ._ternary import ternary

Tensors = Sequence[LazyTensor]
Sizes = Mapping[str, int]
Step = Callable[[Tensors, Sizes], list[LazyTensor]]

_FLOAT16 = np.dtype(np.float16)
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Transform:
    """A rearrangement and its inverse.

    Attributes:
        apply: Hugging Face tensors to GGUF tensors.
        undo: the other way.
        changes_values: does more than move elements.
        moves_rows: moves whole rows (the last dim) only, so it may be done to their blocks.
    """

    apply: Step
    undo: Step
    changes_values: bool = False
    moves_rows: bool = False


def _same(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return list(tensors)


def _pairs(name: str) -> Transform:
    return Transform(
        lambda tensors, sizes: [interleave(t, sizes[name]) for t in tensors],
        lambda tensors, sizes: [deinterleave(t, sizes[name]) for t in tensors],
        moves_rows=True,
    )


def _stacks(name: str) -> Transform:
    return Transform(
        lambda tensors, sizes: [stack_experts(tensors)],
        lambda tensors, sizes: unstack_experts(tensors[0], sizes[name]),
        moves_rows=True,
    )


def _transpose(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [transpose(t) for t in tensors]


def _from_first_position(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [t.slice([slice(sizes["first_position"], None)]) for t in tensors]


def _with_rows_before(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    out = []
    for t in tensors:
        unused = np.zeros((sizes["first_position"], *t.shape[1:]), t.dtype)
        out.append(concat([from_array(unused), t]))
    return out


def _fill_rows(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    out = []
    for t in tensors:
        absent = sizes["vocab"] - t.shape[0]
        if absent < 0:
            raise ValueError(f"{t.shape[0]} rows, but the model has {sizes['vocab']} tokens")
        rest = np.zeros((absent, *t.shape[1:]), t.dtype)
        out.append(concat([t, from_array(rest)]) if absent else t)
    return out


def _join(tensors: Tensors, axis: int) -> LazyTensor:
    return concat(list(tensors), axis % tensors[0].ndim)


def _even_odd(tensor: LazyTensor, axis: int) -> list[LazyTensor]:
    """Part a dim of alternating entries. Raises ValueError when it is odd."""
    axis %= tensor.ndim
    n, before, after = tensor.shape[axis], tensor.shape[:axis], tensor.shape[axis + 1 :]
    if n % 2:
        raise ValueError(f"{n} rows do not alternate between gate and up")
    view = tensor.reshape((*before, n // 2, 2, *after))
    half = (*before, n // 2, *after)
    at = [slice(None)] * (axis + 1)
    return [view.slice([*at, slice(k, k + 1)]).reshape(half) for k in (0, 1)]


def _alternate(tensors: Tensors, axis: int) -> LazyTensor:
    """The inverse of ``_even_odd``."""
    shape = tensors[0].shape
    axis %= len(shape)
    joined = concat([t.reshape((*shape[: axis + 1], 1, *shape[axis + 1 :])) for t in tensors],
                    axis + 1)  # fmt: skip
    return joined.reshape((*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]))


def _pack_mxfp4(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [pack_mxfp4(tensors[0], tensors[1])]


def _unpack_mxfp4(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return list(unpack_mxfp4(_rows(tensors[0])))


def _pack_gate_up(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """Part alternating rows of [experts, rows, blocks, 16] and [experts, rows, blocks]."""
    parts = zip(_even_odd(tensors[0], 1), _even_odd(tensors[1], 1), strict=True)
    return [pack_mxfp4(blocks, scales) for blocks, scales in parts]


def _unpack_gate_up(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    parts = zip(*(unpack_mxfp4(_rows(t)) for t in tensors), strict=True)
    return [_alternate(part, 1) for part in parts]


def _rows(tensor: LazyTensor) -> LazyTensor:
    if not isinstance(tensor, BlockTensor):
        raise ValueError(f"{tensor} is not MXFP4")
    return tensor.blocks


def _heads(sizes: Sizes) -> tuple[int, int, int]:
    return sizes["heads"], sizes["kv_heads"], sizes["head"]


def _ungroup(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    return [concat(ungroup_qkv(tensors[0], *_heads(sizes)))]


def _group(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    parts = split_rows(tensors[0], [sizes["q"], sizes["kv"], sizes["kv"]])
    return [group_qkv(parts, *_heads(sizes))]


def _split_pairs(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    q, k, v = split_rows(tensors[0], [sizes["q"], sizes["kv"], sizes["kv"]])
    return [interleave(q, sizes["heads"]), interleave(k, sizes["kv_heads"]), v]


def _join_pairs(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    q, k, v = tensors
    return [concat([deinterleave(q, sizes["heads"]), deinterleave(k, sizes["kv_heads"]), v])]


def _split_kv_b(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    """[heads * (nope + v), rank] to keys [heads, rank, nope] and values [heads, v, rank]."""
    heads, rank = sizes["heads"], tensors[0].shape[-1]
    view = tensors[0].reshape((heads, sizes["nope"] + sizes["v"], rank))
    keys, values = split(view, [sizes["nope"], sizes["v"]], 1)
    return [transpose(keys), values]


def _join_kv_b(tensors: Tensors, sizes: Sizes) -> list[LazyTensor]:
    joined = concat([transpose(tensors[0]), tensors[1]], 1)
    return [joined.reshape((joined.shape[0] * joined.shape[1], joined.shape[2]))]


def _shift(tensors: Tensors, delta: int) -> list[LazyTensor]:
    """Add to the values: in half precision where they are, else in float32, as the reference."""
    kinds = [_FLOAT16 if t.dtype == _FLOAT16 else _FLOAT32 for t in tensors]
    return [
        t.cast(kind).map(partial(np.add, kind.type(delta)), kind)
        for t, kind in zip(tensors, kinds, strict=True)
    ]


#: name -> transform. Directions: Hugging Face to GGUF.
TRANSFORMS: Mapping[str, Transform] = {
    "": Transform(_same, _same, moves_rows=True),
    # rotary halves -> adjacent rotary pairs, for llama.cpp's NORM kind of rope
    "permute_q": _pairs("heads"),
    "permute_k": _pairs("kv_heads"),
    # one tensor per expert (or head) -> [count, ...]
    "stack": _stacks("experts"),
    "stack_heads": _stacks("heads"),
    "stack_kv_heads": _stacks("kv_heads"),
    # position embeddings without the rows before the first
    "from_first_position": Transform(_from_first_position, _with_rows_before),
    "stack_others": _stacks("others"),
    # zeros for the tokens that have no row; they stay
    "fill_rows": Transform(_fill_rows, _same),
    # [in, out] -> [out, in]
    "transpose": Transform(_transpose, _transpose),
    # [..., gate ; up, in] -> gate, up
    "split_gate_up": Transform(
        lambda tensors, sizes: halves(tensors[0], -2),
        lambda tensors, sizes: [_join(tensors, -2)],
        moves_rows=True,
    ),
    # [..., in, gate | up] -> gate, up
    "transpose_split_gate_up": Transform(
        lambda tensors, sizes: halves(transpose(tensors[0]), -2),
        lambda tensors, sizes: [transpose(_join(tensors, -2))],
    ),
    # [experts, in, gate, up, gate, up, ...] -> gate, up
    "transpose_alternating_gate_up": Transform(
        lambda tensors, sizes: _even_odd(transpose(tensors[0]), -2),
        lambda tensors, sizes: [transpose(_alternate(tensors, -2))],
    ),
    # biases [experts, gate, up, gate, up, ...] -> gate, up
    "alternating_gate_up": Transform(
        lambda tensors, sizes: _even_odd(tensors[0], -1),
        lambda tensors, sizes: [_alternate(tensors, -1)],
    ),
    # 4-bit blocks and their exponents -> ggml's blocks; the same for alternating gate and up rows
    "mxfp4": Transform(_pack_mxfp4, _unpack_mxfp4),
    "mxfp4_alternating_gate_up": Transform(_pack_gate_up, _unpack_gate_up),
    # rows [q*r, k, v] per query group -> [q | k | v]
    "ungroup_qkv": Transform(_ungroup, _group, moves_rows=True),
    # latent attention: the up-projection of keys and values -> keys, values
    "split_kv_b": Transform(_split_kv_b, _join_kv_b),
    # q|k|v to q, k, v with adjacent rotary pairs; the same for query groups
    "split_qkv_pairs": Transform(_split_pairs, _join_pairs, moves_rows=True),
    "ungroup_qkv_pairs": Transform(
        lambda tensors, sizes: _split_pairs(_ungroup(tensors, sizes), sizes),
        lambda tensors, sizes: _group(_join_pairs(tensors, sizes), sizes),
        moves_rows=True,
    ),
    # state spaces
    "negative_exp": Transform(state.negative_exp, state.negative_log, changes_values=True),
    "negative_exp_column": Transform(
        lambda tensors, sizes: state.column(state.negative_exp(tensors, sizes), sizes),
        lambda tensors, sizes: state.negative_log(state.flat(tensors, sizes), sizes),
        changes_values=True,
    ),
    "column": Transform(state.column, state.flat),
    "squeeze": Transform(state.squeeze, state.unsqueeze),
    "by_group": Transform(state.by_group, state.flat),
    # linear attention: value heads in the order in which key heads are repeated
    "tiled_values": Transform(state.tiled_values(), state.tiled_values(back=True), moves_rows=True),
    "tiled_heads": Transform(
        state.tiled("value_head"), state.tiled("value_head", back=True), moves_rows=True
    ),
    "tiled": Transform(state.tiled(""), state.tiled("", back=True), moves_rows=True),
    "tiled_columns": Transform(
        state.tiled("value_head", 1), state.tiled("value_head", 1, back=True)
    ),
    "squeeze_tiled_values": Transform(
        lambda tensors, sizes: state.tiled_values()(state.squeeze(tensors, sizes), sizes),
        lambda tensors, sizes: state.unsqueeze(
            state.tiled_values(back=True)(tensors, sizes), sizes
        ),
    ),
    "negative_exp_tiled": Transform(
        lambda tensors, sizes: state.tiled("")(state.negative_exp(tensors, sizes), sizes),
        lambda tensors, sizes: state.negative_log(
            state.tiled("", back=True)(tensors, sizes), sizes
        ),
        changes_values=True,
    ),
    "split_qkvz": Transform(state.split_qkvz, state.join_qkvz),
    # weights that are -1, 0 or 1 times their mean magnitude
    "ternary": Transform(
        lambda tensors, sizes: [ternary(t) for t in tensors],
        _same,
        changes_values=True,
        moves_rows=True,
    ),
    # norm weights that the model stores minus one
    "plus_one": Transform(
        lambda tensors, sizes: _shift(tensors, 1),
        lambda tensors, sizes: _shift(tensors, -1),
        changes_values=True,
    ),
}
