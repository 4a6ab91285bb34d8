"""FP8 and INT8 weights with scales: per tensor, per row, per group of columns, per block.

Sources: DeepSeek-V3 ``inference/kernel.py`` (``weight_scale_inv``, 128 x 128 blocks), transformers
``finegrained_fp8``, ``fbgemm_fp8``, compressed-tensors (``float-quantized``, ``int-quantized``),
bitsandbytes ``LLM.int8()`` (``SCB``: row maxima, 127 steps).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import FormatError
from ..tensor import LazyTensor
from .coded import Coded, Integers
from .node import F32, Decoded, region


class Scaled(Decoded):
    """``(weight - zero) * scale``, scale (and zero) one for each ``block`` of the matrix."""

    __slots__ = ("_block",)

    def __init__(
        self,
        weight: LazyTensor,
        scale: LazyTensor,
        dtype: np.dtype,
        block: tuple[int, int],
        zero: LazyTensor | None = None,
    ) -> None:
        parts = (weight, scale) if zero is None else (weight, scale, zero)
        super().__init__(weight.shape, dtype, parts)
        self._block = block

    def decode(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Decode a region."""
        weight, scale, *zero = self._parts
        value = region(weight, top, bottom, left, right).astype(F32)
        for z in zero:
            value -= self._spread(z, top, bottom, left, right)
        value *= self._spread(scale, top, bottom, left, right)
        return value

    def _spread(self, part: LazyTensor, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """The scale of each element of a region (dims of one scale stay 1, for broadcasting)."""
        high, wide = self._block
        held = region(part, top // high, -(-bottom // high), left // wide, -(-right // wide))
        value = held.astype(F32)
        if held.shape[0] > 1:
            value = value[np.arange(top, bottom) // high - top // high]
        if held.shape[1] > 1:
            value = value[:, np.arange(left, right) // wide - left // wide]
        return value


def scaled(
    name: str,
    weight: LazyTensor,
    scale: LazyTensor,
    dtype: np.dtype,
    *,
    block: Sequence[int] | None = None,
    zero: LazyTensor | None = None,
    levels: tuple[int, int] | None = None,
) -> LazyTensor:
    """Return ``weight`` times its scales.

    Args:
        name: for messages.
        weight: [rows, columns].
        scale: one; [rows] or [rows, 1]; [rows, groups]; or [row blocks, column blocks].
        dtype: of the result.
        block: sizes of a block, where they are known; else they follow from the shapes.
        zero: of the shape of the scales, or None.
        levels: the least and the greatest weight, where weights are whole numbers.

    Raises:
        FormatError: shapes that do not fit.
    """
    if weight.ndim != 2:
        raise FormatError(f"{name}: is quantized with {weight.ndim} dims; expected a matrix")
    rows, columns = weight.shape
    grid = _grid(scale, rows)
    if block is None:
        ratio = tuple(-(-n // max(g, 1)) for n, g in zip((rows, columns), grid.shape, strict=True))
    else:
        ratio = (int(block[0]), int(block[1]))
    fits = all(
        b > 0 and -(-n // b) == g
        for n, b, g in zip((rows, columns), ratio, grid.shape, strict=True)
    )
    if not fits:
        raise FormatError(
            f"{name}: {list(weight.shape)} in blocks of {list(ratio)} does not have scales "
            f"{list(scale.shape)}"
        )
    offset = None if zero is None else _grid(zero, rows)
    size = (ratio[0], ratio[1])
    values = Scaled(weight, grid, dtype, size, offset)
    if levels is None or (offset is not None and offset.shape != grid.shape):
        return values
    exact = Scaled(weight, grid, F32, size, offset)
    return Coded(values, Integers(exact, grid, size, *levels, offset))


def _grid(scale: LazyTensor, rows: int) -> LazyTensor:
    if scale.size == 1:
        return scale.reshape((1, 1))
    if scale.ndim == 1 and scale.shape[0] == rows:
        return scale.reshape((rows, 1))
    if scale.ndim != 2:
        raise FormatError(f"scales {list(scale.shape)} for a matrix of {rows} rows")
    return scale
