"""The flat buffers of Megatron's distributed optimizer: which parameter lies where.

Source: ``megatron/core/distributed/param_and_grad_buffer.py`` and ``megatron/core/optimizer/
distrib_optimizer.py``. A rank's parameters are laid out in the REVERSE order of
``named_parameters()``, each start rounded up to 64 elements; dense and expert parameters, model
chunks and element types have buffers of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ..box import Index
from ..tensor import LazyTensor

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter on one rank.

    Attributes:
        name: ``chunk/saved name``.
        shape: what the rank holds.
        dtype: element type in the model.
        chunk: virtual pipeline chunk.
        expert: belongs to a routed expert.
    """

    name: str
    shape: Index
    dtype: np.dtype
    chunk: int
    expert: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def buffers_of(params: Sequence[Param]) -> list[list[Param]]:
    """Return the parameters of each buffer, in buffer order; experts after all dense ones."""
    groups: dict[tuple[bool, int, str], list[Param]] = {}
    for p in params:
        groups.setdefault((p.expert, p.chunk, p.dtype.name), []).append(p)
    keys = sorted(groups, key=lambda k: k[:2])
    return [groups[k][::-1] for k in keys]


def spans_of(params: Sequence[Param]) -> Iterator[tuple[Param, int, int]]:
    """Yield (parameter, start, end) in elements for a buffer's parameters in buffer order."""
    at = 0
    for p in params:
        start = -(-at // _ALIGN) * _ALIGN
        at = start + p.size
        yield p, start, at


def unflatten(flat: LazyTensor, params: Sequence[Param]) -> dict[str, LazyTensor]:
    """Return saved name to tensor for a buffer that lies in ``flat``."""
    return {
        p.name: flat.slice([slice(start, end)]).reshape(p.shape)
        for p, start, end in spans_of(params)
    }
