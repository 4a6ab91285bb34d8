"""Dropout that does not depend on the layout: which value is dropped is a function of where it is.

A value is known by the run's seed, the layer, the number of its row since the start of the run
(which says step, micro-batch and row), its position and its feature. Whatever rank holds it,
whenever it is computed again, it meets the same fate; there is no generator to save.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..attention import Context

_BITS = 24


class Rows:
    """Which rows a model part computes now; its layers say so, also when they compute again.

    Attributes:
        numbers: int64 [rows], counted since the start of the run.
        context: None when the rank has whole rows.
    """

    def __init__(self, context: Context | None) -> None:
        self.numbers: Tensor | None = None
        self.context = context


class RowDropout:
    """Drops a part of the values of [rows, seq, features] and scales the others up.

    Args:
        part: how many are dropped, of 1.
        key: of the layer.
        rows: of its model part.
    """

    def __init__(self, part: float, key: str, rows: Rows) -> None:
        self.part, self.rows = part, rows
        digest = blake2b(key.encode(), digest_size=7).digest()
        self.key = int.from_bytes(digest, "little")

    def __call__(self, x: Tensor) -> Tensor:
        if self.rows.numbers is None:  # evaluation
            return x
        if not isinstance(x, DTensor):
            return x * self.kept(x, 0)
        _, starts = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
        kept = self.kept(x.to_local(), starts[2])
        return x * DTensor.from_local(kept, x.device_mesh, x.placements, run_check=False)

    def kept(self, x: Tensor, feature: int) -> Tensor:
        """Return 0 where a value is dropped, else 1 / (1 - part), of the shape of ``x``.

        Args:
            x: [rows, seq, features].
            feature: number of the first one, where features are cut over ranks.
        """
        assert self.rows.numbers is not None, "the caller has looked"
        context, device = self.rows.context, x.device
        first = context.rank * x.shape[1] if context is not None else 0
        at = torch.arange(first, first + x.shape[1], device=device)
        of = torch.arange(feature, feature + x.shape[2], device=device)
        mixed = _mixed(self.rows.numbers[:, None] * 0x9E3779B1 + at + self.key)
        mixed = _mixed(mixed[..., None] + of * 0x85EBCA77)
        keep = (mixed & ((1 << _BITS) - 1)) >= int(self.part * (1 << _BITS))
        return keep.to(x.dtype) / (1 - self.part)


def _mixed(x: Tensor) -> Tensor:
    """Spread every bit over all: two rounds of multiply and shift, modulo 2^63."""
    for factor in (0x2545F4914F6CDD1D, 0x369DEA0F31A53F85):
        x = (x ^ ((x >> 29) & 0x7FFFFFFFF)) * factor
    return x ^ ((x >> 32) & 0xFFFFFFFF)
