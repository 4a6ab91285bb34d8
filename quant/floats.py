"""Casts between float32, float16 and bfloat16 with ggml's exact bits (numpy only).

Rounding is to nearest even; a NaN becomes the quiet NaN that ggml writes (0x7E00 plus sign in
float16, the truncated payload with bit 6 set in bfloat16). Large arrays are cast in slices that
stay in the processor's cache.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)

_SLICE = 1 << 16


def to_float32(x: npt.NDArray) -> npt.NDArray[np.float32]:
    """Return ``x`` (float32, float16 or bfloat16) as float32, itself if it already is."""
    if x.dtype == FLOAT32:
        return x
    if x.dtype == BFLOAT16:
        wide = x.view(np.uint16).astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return x.astype(np.float32)


def bf16_bits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 and return its bits (uint16, same shape)."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    out = np.empty(x.shape, np.uint16)
    flat, target = bits.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, _SLICE):
        part = flat[start : start + _SLICE]
        high = part >> np.uint32(16)
        rounded = part + ((high & np.uint32(1)) + np.uint32(0x7FFF))
        rounded >>= np.uint32(16)
        is_nan = (part & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        if is_nan.any():
            rounded[is_nan] = high[is_nan] | np.uint32(64)
        target[start : start + _SLICE] = rounded
    return out


def f16_bits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to float16 and return its bits (uint16, same shape); overflow: inf."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        out = np.ascontiguousarray(x).astype(np.float16).view(np.uint16)
    is_nan = (out & np.uint16(0x7FFF)) > np.uint16(0x7C00)
    if is_nan.any():
        out[is_nan] = (out[is_nan] & np.uint16(0x8000)) | np.uint16(0x7E00)
    return out
