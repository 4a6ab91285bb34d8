"""What the data gives and the step takes: tokens, labels, positions, documents.

A data source is a pure function of (step, batch, rank, number of ranks): there is no loader state.
Ranks here are data parallel ranks; the ranks of ``pp``, ``tp`` and ``cp`` get the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

#: The label of a token that does not count.
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens, all int64 [rows, seq]."""

    inputs: Tensor
    labels: Tensor  # the token after each input, or IGNORE
    positions: Tensor  # which start anew with each packed document
    documents: Tensor | None = None  # equal for tokens that may see each other; None: for all

    def rows(self, first: int, count: int) -> Batch:
        """Return ``count`` rows from ``first`` on."""
        part = slice(first, first + count)
        documents = None if self.documents is None else self.documents[part]
        return Batch(self.inputs[part], self.labels[part], self.positions[part], documents)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        inputs, labels, positions = (
            t.to(device, non_blocking=True) for t in (self.inputs, self.labels, self.positions)
        )
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(inputs, labels, positions, documents)


class DataSource(Protocol):
    """Where batches come from."""

    @property
    def samples(self) -> int:
        """Number of rows of an epoch."""
        ...

    def fingerprint(self) -> str:
        """Return what changes when any batch does; empty if that is not known."""
        ...

    def batch(self, step: int, batch: int, rank: int, world_size: int) -> Batch:
        """Return a rank's part of a step's batch.

        Args:
            step: counted from 0.
            batch: rows over all ranks.
            rank, world_size: data parallel; rank r has rows r * batch / world_size onwards.
        """
        ...
