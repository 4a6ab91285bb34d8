"""Number format conversions, round to nearest even, at memory speed where numpy is slow.

bfloat16 is the top half of a float32, so widening is a shift, and narrowing adds the rounding bit
before the shift (NaNs are kept NaN by setting a mantissa bit, as torch and ggml do). Everything
else is numpy's own ``astype``.
"""

from __future__ import annotations

import numpy as np

from .dtypes import BFLOAT16, FLOAT32
from .tensor import Elementwise


def caster(source: np.dtype, target: np.dtype) -> Elementwise:
    """Return an elementwise function from ``source`` to ``target`` dtype."""
    if source == BFLOAT16 and target == FLOAT32:
        return widen_bf16
    if source == FLOAT32 and target == BFLOAT16:
        return narrow_bf16

    def convert(x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return x.astype(target)

    return convert


def widen_bf16(x: np.ndarray) -> np.ndarray:
    """Return bfloat16 values as float32 (exact)."""
    wide = np.left_shift(x.view(np.uint16), np.uint32(16), dtype=np.uint32)
    return wide.view(np.float32)


def narrow_bf16(x: np.ndarray) -> np.ndarray:
    """Return float32 values as bfloat16, round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(64)).astype(np.uint16)
    return rounded.view(BFLOAT16)
