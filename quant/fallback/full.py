"""Least-error searches as array programs, for formats where ggml takes a scale in one shot.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0, Q1_0, Q2_0, MXFP4, NVFP4; see ``search`` for the
conventions. The same steps as ``native/full.hpp``: scales are swept and each is refitted by least
squares under the given weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from .pack import (
    assemble,
    columns,
    crumbs,
    fifth_bits,
    half,
    lookup,
    nibbles,
    safe_inverse,
    spread,
)
from .plain import (
    E4M3,
    e4m3_codes,
    mx_exponent,
    mx_half,
    put_mxfp4,
    put_nvfp4,
    put_q1_0,
    put_q2_0,
    put_tq1_0,
)
from .search import (
    EPSILON,
    WITH_IMPORTANCE,
    Array,
    backend,
    clip,
    divided,
    f32,
    nearest,
    over,
    peak,
    real,
    search_asymmetric,
    total,
)

# How many times the largest level the peak of a block may stand for, with very few levels.
_REACHES = (
    0.75, 0.9, 1.05, 1.2, 1.35, 1.5, 1.7, 1.9, 2.1, 2.35, 2.6, 2.9, 3.2, 3.6, 4, 4.5, 5.1, 6, 7,
    8.5, 11, 15, 22, 40,
)  # fmt: skip
_E2M1_STEPS = ((0.5, 1), (1.5, 1), (2.5, 1), (3.5, 1), (5.0, 2), (7.0, 2), (10.0, 4))


def _search_scale(x: Array, w: Array, low: int, top: int, reaches: Sequence[float]) -> Array:
    """Best scale [blocks] for levels low .. top; candidates map the peak to a reach."""
    xp = backend(x)
    amax, value = peak(x)
    zero = amax < (np.float32(EPSILON) if isinstance(x, np.ndarray) else EPSILON)
    value = xp.where(zero, xp.ones_like(value), value)
    scale = best = xp.zeros_like(value)
    for reach in (*reaches, None, None):
        inverse = safe_inverse(scale) if reach is None else over(reach, value)
        level = real(clip(nearest(inverse * x), low, top))
        wl = w * level
        qx, q2 = total(wl * x), total(wl * level)
        better = (q2 > 0) & (qx * qx > best * q2)
        fitted = qx / q2
        scale = xp.where(better, fitted, scale)
        best = xp.where(better, fitted * qx, best)
    return xp.where(zero, xp.zeros_like(scale), scale)


def _levels(
    rows: Array, weights: Array, block: int, low: int, top: int, reaches: Sequence[float]
) -> tuple[Array, Array]:
    """Stored levels 0 .. top - low and the scale's bytes."""
    x = columns(rows, block)
    d = _search_scale(x, spread(weights, rows.shape[0], block), low, top, reaches)
    d_bytes, stored = half(d)
    return clip(nearest(safe_inverse(stored) * x), low, top) - low, d_bytes


def full_symmetric(rows: Array, weights: Array, bits: int) -> Array:
    """Q4_0, Q5_0."""
    top = 1 << (bits - 1)
    factors = [f32(f32(0.8) + f32(f32(0.0125) * k)) for k in range(33)]
    q, d_bytes = _levels(rows, weights, 32, -top, top - 1, [-f32(top * f) for f in factors])
    return assemble([d_bytes, *([fifth_bits(q)] if bits == 5 else []), nibbles(q)], rows.shape[0])


def full_asymmetric(rows: Array, weights: Array, bits: int) -> Array:
    """Q4_1, Q5_1."""
    x, top = columns(rows, 32), (1 << bits) - 1
    found = search_asymmetric(x, spread(weights, rows.shape[0], 32), top, WITH_IMPORTANCE)
    d_bytes, d = half(found.scale)
    m_bytes, m = half(-found.minimum)
    q = clip(nearest((x - m) * safe_inverse(d)), 0, top)
    high = [fifth_bits(q)] if bits == 5 else []
    return assemble([d_bytes, m_bytes, *high, nibbles(q)], rows.shape[0])


def full_q8_0(rows: Array, weights: Array) -> Array:
    """Q8_0, with all 256 levels in use."""
    reaches = [-(125 + 0.25 * k) for k in range(25)]
    q, d_bytes = _levels(rows, weights, 32, -128, 127, reaches)
    return assemble([d_bytes, q - 128], rows.shape[0])


def full_tq1_0(rows: Array, weights: Array) -> Array:
    """TQ1_0."""
    q, d_bytes = _levels(rows, weights, 256, -1, 1, _REACHES)
    return put_tq1_0(q, d_bytes, rows.shape[0])


def full_tq2_0(rows: Array, weights: Array) -> Array:
    """TQ2_0."""
    q, d_bytes = _levels(rows, weights, 256, -1, 1, _REACHES)
    return assemble([crumbs(q), d_bytes], rows.shape[0])


def full_q1_0(rows: Array, weights: Array) -> Array:
    """Q1_0: the signs fix the levels, so the weighted mean magnitude is the best scale."""
    x = columns(rows, 128)
    xp, w = backend(x), spread(weights, rows.shape[0], 128)
    every = total(w)
    d = total(w * xp.abs(x)) / every
    return put_q1_0(x, xp.where(every > 0, d, xp.zeros_like(d)), rows.shape[0])


def full_q2_0(rows: Array, weights: Array) -> Array:
    """Q2_0: levels -1 .. 2 are lopsided, so either sign of the scale may be the better one."""
    reaches = (*_REACHES, *(-r for r in _REACHES))
    q, d_bytes = _levels(rows, weights, 64, -1, 2, reaches)
    return put_q2_0(q, d_bytes, rows.shape[0])


def _e2m1_error(x: Array, w: Array, d: Array) -> Array:
    xp = backend(x)
    a = xp.abs(x)
    value = xp.zeros_like(x)
    for middle, step in _E2M1_STEPS:
        value = value + real(a > d * middle) * step
    diff = a - value * d
    return total(w * diff * diff)


def _search_code(
    x: Array, w: Array, start: Array, offsets: range, limit: int, value: Callable[[Array], Array]
) -> Array:
    """Best scale code near ``start``, which stays on ties."""
    xp = backend(x)
    found, best = start, _e2m1_error(x, w, value(start))
    for offset in offsets:
        code = clip(start + offset, 0, limit)
        error = _e2m1_error(x, w, value(code))
        better = error < best
        found, best = xp.where(better, code, found), xp.where(better, error, best)
    return found


def full_mxfp4(rows: Array, weights: Array) -> Array:
    """MXFP4."""
    x = columns(rows, 32)
    w = spread(weights, rows.shape[0], 32)
    e = _search_code(x, w, mx_exponent(peak(x)[0]), range(-2, 2), 254, mx_half)
    return put_mxfp4(x, e, rows.shape[0])


def full_nvfp4(rows: Array, weights: Array) -> Array:
    """NVFP4."""
    x = columns(rows, 16)
    w = spread(weights, rows.shape[0], 16)
    start = e4m3_codes(divided(peak(x)[0], 6))
    code = _search_code(x, w, start, range(-4, 7), 0x7E, partial(lookup, E4M3))
    return put_nvfp4(x, code, rows.shape[0])


FULL = {
    "Q4_0": partial(full_symmetric, bits=4),
    "Q4_1": partial(full_asymmetric, bits=4),
    "Q5_0": partial(full_symmetric, bits=5),
    "Q5_1": partial(full_asymmetric, bits=5),
    "Q8_0": full_q8_0,
    "TQ1_0": full_tq1_0,
    "TQ2_0": full_tq2_0,
    "Q1_0": full_q1_0,
    "Q2_0": full_q2_0,
    "MXFP4": full_mxfp4,
    "NVFP4": full_nvfp4,
}
