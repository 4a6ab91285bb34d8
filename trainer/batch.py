"""What the data gives and the step takes: tokens, labels, positions, documents.

A data source is a pure function of (step, batch, rank, number of ranks): there is no loader state.
Ranks here are data parallel ranks; the ranks of ``pp``, ``tp`` and ``cp`` get the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

#: The label of a token that does not count.
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens.

    Attributes:
        inputs: int64 [rows, seq].
        labels: int64 [rows, seq]: the token after each input, or ``IGNORE``.
        positions: int64 [rows, seq], which start anew with each packed document.
        documents: int64 [rows, seq], equal for tokens that may see each other; None when each row
            is one document.
    """

    inputs: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor | None = None

    def rows(self, first: int, count: int) -> Batch:
        """Return ``count`` rows from ``first`` on."""
        part = slice(first, first + count)
        documents = None if self.documents is None else self.documents[part]
        return Batch(self.inputs[part], self.labels[part], self.positions[part], documents)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        documents = None if self.documents is None else self.documents.to(device)
        inputs, labels, positions = (
            t.to(device, non_blocking=True) for t in (self.inputs, self.labels, self.positions)
        )
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


def from_rows(rows: np.ndarray) -> Batch:
    """Return the batch of rows int64 [rows, seq + 1], each one document."""
    ids = torch.from_numpy(rows)
    positions = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
    return Batch(ids[:, :-1], ids[:, 1:], positions)
