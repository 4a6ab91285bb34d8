"""IQ4_NL and IQ4_XS as array programs (numpy or torch); see ``search`` for the conventions.

Four-bit indices into a fixed table of 16 values. Source of the algorithm: ggml's encoder (own
implementation); the fast form is ``native/iq4.hpp``.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from .pack import (
    assemble,
    columns,
    error_weights,
    half,
    lookup,
    nibbles,
    safe_inverse,
    scaled,
    spread,
)
from .search import EPSILON, Array, backend, clip, divided, nearest, over, peak, sum_squares, total

VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_MIDDLES = (VALUES[1:] + VALUES[:-1]) / 2


def _index(x: Array) -> Array:
    """Nearest table entry, the upper one on ties."""
    if isinstance(x, np.ndarray):
        return np.searchsorted(_MIDDLES, x, side="right").astype(np.int32)
    import torch

    middles = torch.from_numpy(_MIDDLES).to(x.device)
    return torch.searchsorted(middles, x.contiguous(), right=True).to(torch.int32)


def _search(x: Array, w: Array) -> Array:
    """Best scale of 32 elements: the plain start, then 15 inverse scales around it."""
    xp = backend(x)
    amax, value = peak(x)
    zero = amax < EPSILON
    value = xp.where(zero, xp.ones_like(value), value)
    scale = best = xp.zeros_like(value)
    for k in (None, *range(-7, 8)):
        inverse = over(1, divided(-value, -127)) if k is None else over(k - 127, value)
        q = lookup(VALUES, _index(inverse * x))
        wq = w * q
        qx, q2 = total(wq * x), total(wq * q)
        better = (q2 > 0) & ((qx * qx > best * q2) if k is not None else (q2 > 0))
        fitted = qx / q2
        scale = xp.where(better, fitted, scale)
        best = xp.where(better, fitted * qx, best)
    return xp.where(zero, xp.zeros_like(scale), scale)


def _weights(rows: Array, x: Array, importance: Array | None, pure: bool) -> Array:
    if importance is None:
        return x * x
    size = x.shape[0]
    mean = sum_squares(x) * (2 / size)
    return error_weights(x, spread(importance, rows.shape[0], size), mean, pure=pure)


def encode_iq4_nl(rows: Array, importance: Array | None, pure: bool = False) -> Array:
    """IQ4_NL: one float16 scale per 32 elements."""
    x = columns(rows, 32)
    d = _search(x, _weights(rows, x, importance, pure))
    d_bytes, stored = half(d)
    q = _index(safe_inverse(stored if pure else d) * x)
    return assemble([d_bytes, nibbles(q)], rows.shape[0])


def encode_iq4_xs(rows: Array, importance: Array | None, pure: bool = False) -> Array:
    """IQ4_XS: eight six-bit scales per 256 elements."""
    x = columns(rows, 256)
    xp = backend(x)
    w = _weights(rows, x, importance, pure)
    scale = xp.stack([_search(x[i : i + 32], w[i : i + 32]) for i in range(0, 256, 32)])
    _, value = peak(scale)
    d = divided(-value, 32)
    d_bytes, stored = half(d)
    d = stored if pure else d
    level = clip(nearest(safe_inverse(d) * scale), -32, 31)
    step = safe_inverse(scaled(level, d))
    q = xp.concatenate([_index(step[j] * x[32 * j : 32 * j + 32]) for j in range(8)])
    level = level + 32
    low = xp.stack([(level[i] & 15) | (level[i + 1] & 15) << 4 for i in (0, 2, 4, 6)])
    top = level >> 4
    high = xp.stack([
        top[i] | top[i + 1] << 2 | top[i + 2] << 4 | top[i + 3] << 6 for i in (0, 4)
    ])  # fmt: skip
    return assemble([d_bytes, high, low, nibbles(q)], rows.shape[0])


ENCODERS = {"IQ4_NL": encode_iq4_nl, "IQ4_XS": encode_iq4_xs}
FULL = {name: partial(encoder, pure=True) for name, encoder in ENCODERS.items()}
