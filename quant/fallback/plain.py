"""One-shot block formats in numpy: Q8_0.

Each block's scale follows from its largest magnitude, so there is nothing to search.
Source of the algorithm: ggml's reference quantizers (own implementation).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..floats import f16_bits

Floats = npt.NDArray[np.float32]


def half_bytes(x: Floats) -> npt.NDArray[np.uint8]:
    """Return the little-endian float16 bytes of ``x`` [n] as uint8 [n, 2]."""
    return f16_bits(x).reshape(-1, 1).view(np.uint8)


def inverse(d: Floats) -> Floats:
    """Return 1/d, and 0 where d is 0."""
    return np.where(d != 0, np.float32(1) / d, np.float32(0))


def round_away(x: Floats) -> npt.NDArray[np.int32]:
    """Round half away from zero, as C's roundf, then convert as x86 does: out of range gives 0."""
    whole = np.trunc(x)
    whole += np.copysign((np.abs(x - whole) >= 0.5).astype(np.float32), x)
    return to_int(whole)


def to_int(x: Floats) -> npt.NDArray[np.int32]:
    """Truncate to int32; values that do not fit become 0 (the low byte of x86's answer)."""
    return np.where(np.abs(x) < 2.0**31, x, np.float32(0)).astype(np.int32)


def encode_q8_0(x: Floats, importance: Floats | None) -> npt.NDArray[np.uint8]:
    """Q8_0: d = absmax / 127 in float16, 32 signed bytes."""
    blocks = x.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1) / np.float32(127)
    q = round_away(blocks * inverse(d)[:, None]).astype(np.int8)
    return np.concatenate([half_bytes(d), q.view(np.uint8)], axis=1)


ENCODERS = {"Q8_0": encode_q8_0}
