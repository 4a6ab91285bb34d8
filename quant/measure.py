"""Quantization errors: sums per tensor, and the choice between two encodings block by block.

The error of a block is the sum of w * (x - y)**2 over its elements, with w the importance of the
column or one. Sums are in float64 with the kernels' order, so that every path chooses alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from threading import Lock

import numpy as np
import numpy.typing as npt

from .types import GgmlType

_LANES = 16


@dataclass(slots=True)
class ErrorSums:
    """Squared errors added up over calls of ``quantize``, from any thread.

    Attributes:
        squares: sum of w * x**2.
        default: error of ggml's own encoding.
        chosen: error of what was written; the same unless ``best`` was asked for.
    """

    squares: float = 0.0
    default: float = 0.0
    chosen: float = 0.0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, sums: Sequence[float] | npt.NDArray[np.float64]) -> None:
        """Add (squares, default, chosen)."""
        squares, default, chosen = map(float, sums)
        with self._lock:
            self.squares += squares
            self.default += default
            self.chosen += chosen

    @property
    def default_rmse(self) -> float:
        """Root mean square error of ggml's encoding, relative to that of the weights."""
        return sqrt(self.default / self.squares) if self.squares else 0.0

    @property
    def chosen_rmse(self) -> float:
        """The same for what was written."""
        return sqrt(self.chosen / self.squares) if self.squares else 0.0


def block_errors(
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.float32] | None,
    weights: npt.NDArray[np.float32] | None,
    kind: GgmlType,
) -> npt.NDArray[np.float64]:
    """Return the error of each block.

    Args:
        x: float32 [rows, cols].
        y: the decoded values, any shape; None stands for zeros.
        weights: float32 [cols] or None.
        kind: whose blocks.
    """
    diff = x.astype(np.float64)
    if y is not None:
        diff -= y.reshape(x.shape)
    error = diff * diff if weights is None else weights.astype(np.float64) * diff * diff
    parts = error.reshape(-1, kind.block // _LANES, _LANES)
    sums = np.zeros((parts.shape[0], _LANES))
    for k in range(parts.shape[1]):
        sums += parts[:, k]
    total = np.zeros(len(sums))
    for lane in range(_LANES):
        total += sums[:, lane]
    return total


def choose_blocks(
    x: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32] | None,
    kind: GgmlType,
    default: npt.NDArray[np.uint8],
    decoded: Sequence[npt.NDArray[np.float32]],
    other: npt.NDArray[np.uint8] | None = None,
) -> tuple[float, float, float]:
    """Put the blocks of ``other`` that have less error into ``default`` (in place).

    Args:
        x: float32 [rows, cols].
        weights: float32 [cols] or None.
        kind: the type.
        default: ggml's encoding, uint8 [rows, row bytes].
        decoded: the values of ``default``, and of ``other`` if it is given.
        other: another encoding of the same rows.

    Returns:
        The sums that ``ErrorSums.add`` takes.
    """
    own = block_errors(x, decoded[0], weights, kind)
    squares, plain = float(block_errors(x, None, weights, kind).sum()), float(own.sum())
    if other is None:
        return squares, plain, plain
    error = block_errors(x, decoded[1], weights, kind)
    better = error < own
    default.reshape(-1, kind.bytes)[better] = other.reshape(-1, kind.bytes)[better]
    return squares, plain, float(np.where(better, error, own).sum())
