"""Q4_0, Q4_1, Q5_0, Q5_1 as array programs (numpy or torch); see ``search`` for the conventions.

Without importance the scale follows from a block's extremes; with it, a weighted search picks it.
Source of the algorithms: ggml's encoders (own implementation); fast form ``native/legacy.hpp``.
"""

from __future__ import annotations

from .pack import (
    assemble,
    columns,
    error_weights,
    fifth_bits,
    half,
    nibbles,
    safe_inverse,
    spread,
    to_int,
)
from .search import (
    WITH_IMPORTANCE,
    Array,
    backend,
    clip,
    divided,
    peak,
    search_asymmetric,
    search_symmetric,
    sum_squares,
)


def _to_int8(x: Array) -> Array:
    """C's float to int8 conversion on x86: truncate, low byte, sign; out of range gives 0."""
    return ((to_int(x) + 128) & 255) - 128


def _weights(rows: Array, x: Array, importance: Array) -> Array:
    """importance * sqrt(mean of the row's squares + x*x), per element [32, blocks]."""
    xp = backend(rows)
    mean = divided(sum_squares(rows.T), rows.shape[1])
    per_row = rows.shape[1] // 32
    means = xp.repeat(mean, per_row) if xp.__name__ == "numpy" else mean.repeat_interleave(per_row)
    return error_weights(x, spread(importance, rows.shape[0], 32), means)


def _symmetric(rows: Array, importance: Array | None, bits: int) -> Array:
    x = columns(rows, 32)
    xp, top = backend(x), 1 << (bits - 1)
    if importance is not None:
        found = search_symmetric(x, _weights(rows, x, importance), top)
        d, q = found.scale, found.levels(x)
    else:
        _, value = peak(x)
        d = divided(value, -top)
        q = _to_int8(x * safe_inverse(d) + (top + 0.5))
        q = xp.where(q > 2 * top - 1, xp.zeros_like(q) + (2 * top - 1), q)
    d_bytes, _ = half(d)
    return assemble([d_bytes, *([fifth_bits(q)] if bits == 5 else []), nibbles(q)], rows.shape[0])


def _asymmetric(rows: Array, importance: Array | None, bits: int) -> Array:
    x = columns(rows, 32)
    xp, top = backend(x), (1 << bits) - 1
    if importance is not None:
        found = search_asymmetric(x, _weights(rows, x, importance), top, WITH_IMPORTANCE)
        d, m, q = found.scale, -found.minimum, found.levels(x)
    else:
        m, high = x[0], x[0]
        for i in range(1, 32):
            m = xp.where(x[i] < m, x[i], m)
            high = xp.where(x[i] > high, x[i], high)
        d = divided(high - m, top)
        q = _to_int8((x - m) * safe_inverse(d) + 0.5)
        q = clip(q, -128, top) if bits == 4 else q
    d_bytes, _ = half(d)
    m_bytes, _ = half(m)
    high_bits = [fifth_bits(q)] if bits == 5 else []
    return assemble([d_bytes, m_bytes, *high_bits, nibbles(q)], rows.shape[0])


def encode_q4_0(x: Array, importance: Array | None) -> Array:
    """Q4_0: scale from the signed absmax."""
    return _symmetric(x, importance, 4)


def encode_q5_0(x: Array, importance: Array | None) -> Array:
    """Q5_0: as Q4_0 with a fifth bit."""
    return _symmetric(x, importance, 5)


def encode_q4_1(x: Array, importance: Array | None) -> Array:
    """Q4_1: scale and minimum."""
    return _asymmetric(x, importance, 4)


def encode_q5_1(x: Array, importance: Array | None) -> Array:
    """Q5_1: as Q4_1 with a fifth bit."""
    return _asymmetric(x, importance, 5)


ENCODERS = {
    "Q4_0": encode_q4_0,
    "Q4_1": encode_q4_1,
    "Q5_0": encode_q5_0,
    "Q5_1": encode_q5_1,
}
