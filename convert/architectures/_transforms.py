"""Named, invertible rearrangements between Hugging Face and GGUF tensors.

``apply`` goes to GGUF, ``undo`` back. All of them are pure movement on lazy tensors.

``permute_q`` / ``permute_k``: llama.cpp's NORM rotary embedding rotates adjacent pairs of rows of
a head, Hugging Face rotates row i with row i + d/2. Rows (head, half, pair) become (head, pair,
half); works for weights and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...errors import ConfigError
from ...shardio.tensor import LazyTensor

Sizes = Mapping[str, int]
Step = Callable[[LazyTensor, Sizes], LazyTensor]


@dataclass(frozen=True, slots=True)
class Transform:
    """A rearrangement and its inverse."""

    apply: Step
    undo: Step


def interleave(tensor: LazyTensor, groups: int, halves: int) -> LazyTensor:
    """View rows as (groups, halves, rest) and swap the last two; shape stays.

    Raises:
        ConfigError: the rows do not divide.
    """
    rows = tensor.shape[0]
    if rows % (groups * halves):
        raise ConfigError(f"{rows} rows do not divide into {groups} heads of {halves} parts")
    rest = tensor.shape[1:]
    view = tensor.reshape((groups, halves, rows // groups // halves, *rest))
    axes = (0, 2, 1, *range(3, 3 + len(rest)))
    return view.permute(axes).reshape(tensor.shape)


def _pairs(name: str) -> Transform:
    return Transform(
        lambda tensor, sizes: interleave(tensor, sizes[name], 2),
        lambda tensor, sizes: interleave(tensor, sizes[name], tensor.shape[0] // sizes[name] // 2),
    )


TRANSFORMS: Mapping[str, Transform] = {
    "permute_q": _pairs("heads"),
    "permute_k": _pairs("kv_heads"),
}
