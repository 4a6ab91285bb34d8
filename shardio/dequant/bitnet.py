"""BitNet's ternary weights: -1, 0 and 1 in two bits, times one scale.

Row ``k * rows + i`` lies in bits 2k and 2k + 1 of row ``i``, plus one. ``bitlinear`` divides by
``weight_scale``, ``autobitlinear`` multiplies. Source: transformers ``integrations/bitnet.py``.
"""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from ..tensor import LazyTensor
from .node import F32, Decoded, region
from .scaled import scaled

_PER_BYTE = 4


class _Trits(Decoded):
    """[4 * packed rows, columns] in float32."""

    __slots__ = ()

    def __init__(self, packed: LazyTensor) -> None:
        super().__init__((packed.shape[0] * _PER_BYTE, packed.shape[1]), F32, (packed,))

    def decode(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Decode a region, a quarter of the rows at a time."""
        (packed,) = self._parts
        rows = packed.shape[0]
        out = np.empty((bottom - top, right - left), F32)
        at = top
        while at < bottom:
            quarter, row = divmod(at, rows)
            count = min(bottom - at, rows - row)
            data = region(packed, row, row + count, left, right)
            out[at - top : at - top + count] = (data >> np.uint8(2 * quarter)) & np.uint8(3)
            at += count
        out -= 1
        return out


def bitnet(
    name: str, packed: LazyTensor, scale: LazyTensor, dtype: np.dtype, *, divide: bool
) -> LazyTensor:
    """Return the weight [4 * rows, columns] of packed bytes [rows, columns].

    Raises:
        FormatError: shapes that do not fit.
    """
    if packed.ndim != 2 or scale.size != 1:
        raise FormatError(f"{name}: BitNet {list(packed.shape)} and scales {list(scale.shape)}")
    whole = scale.cast(F32)
    factor = whole.map(lambda s: np.float32(1) / s) if divide else whole
    return scaled(name, _Trits(packed), factor, dtype, levels=(-1, 1))
