"""Decoded weights that still know their codes, for who can write the codes as they are.

``Coded`` reads as the plain weight, rounded to the model's type. Its ``codes`` say how the weight
is stored: integers with scales (``Integers``), or four-bit floats in blocks (``Floats``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..box import Box
from ..tensor import LazyTensor


@dataclass(frozen=True, slots=True)
class Integers:
    """``(code - zero) * scale`` with codes from ``low`` to ``high``.

    Attributes:
        exact: the float32 products, [rows, columns].
        scale: [rows / block[0], columns / block[1]], rounded up.
        block: rows and columns that share a scale.
        low, high: of the codes.
        zero: of the shape of ``scale``, whole numbers; None: 0.
        order: the group of each column, where the file says it; None: ``column // block[1]``.
    """

    exact: LazyTensor
    scale: LazyTensor
    block: tuple[int, int]
    low: int
    high: int
    zero: LazyTensor | None = None
    order: LazyTensor | None = None


@dataclass(frozen=True, slots=True)
class Floats:
    """Four-bit floats (E2M1), two in a byte, the low half first.

    Attributes:
        kind: ``MXFP4`` (32 columns share a power of two) or ``NVFP4`` (16 an FP8 scale).
        packed: uint8 [rows, columns / 2].
        scale: uint8 [rows, columns / group]: E8M0 or E4M3 bits.
        factor: float32 [1], what every value is multiplied with; None: 1.
        input_factor: the same for the layer's input, which a runtime may quantize too; None: 1.
    """

    kind: str
    packed: LazyTensor
    scale: LazyTensor
    factor: LazyTensor | None = None
    input_factor: LazyTensor | None = None


Codes = Integers | Floats


class Coded(LazyTensor):
    """A plain weight together with the codes it is decoded from."""

    __slots__ = ("_codes", "_values")

    def __init__(self, values: LazyTensor, codes: Codes) -> None:
        super().__init__(values.shape, values.dtype)
        self._values = values
        self._codes = codes

    @property
    def codes(self) -> Codes:
        """How the weight is stored."""
        return self._codes

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Decode a region."""
        self._values.fill(out, box)

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The file pieces of the codes and scales."""
        return self._values.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The leaves of the codes and scales."""
        return self._values.leaves()
