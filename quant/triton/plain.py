"""Formats whose scale follows from a block's extremes: one pass, at the speed of memory.

Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 without importance. A tile is [blocks, pairs]; only maxima, minima
and sums of disjoint bits are reduced over it, which no order changes. Steps are those of
``..fallback.plain`` and ``..fallback.legacy``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arith import bits, clip, from_bits, half, negative, round_away, safe_inverse, to_int8
from .lanes import load_pair, store_half


@triton.jit
def flag_odd(bad: tl.tensor, amax: tl.tensor) -> None:
    """Set the flag if a magnitude is not finite (NaN was made infinite by ``magnitude``)."""
    one = tl.full(amax.shape, 1, tl.int32)
    tl.store(bad + tl.zeros_like(one), one, mask=(amax < float("inf")) == 0)


@triton.jit
def magnitude(x: tl.tensor) -> tl.tensor:
    """The absolute value, infinity for NaN, which a maximum might drop."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def encode_q8_0(
    x: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    FLOAT: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Q8_0: d = absmax / 127 in float16, 32 signed bytes."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = block < blocks
    pair = tl.arange(0, 16)[None, :]
    a, b = load_pair(x, block[:, None] * 16 + pair, here[:, None], FLOAT)
    amax = tl.max(tl.maximum(magnitude(a), magnitude(b)), axis=1)
    flag_odd(bad, amax)
    d = tl.div_rn(amax, tl.zeros_like(amax) + 127.0)
    inverse = safe_inverse(d)[:, None]
    code, _ = half(d)
    store_half(out, block * 34, code, here)
    two = (round_away(a * inverse) & 255) | round_away(b * inverse) << 8
    tl.store(out + block[:, None] * 17 + 1 + pair, two.to(tl.int16), mask=here[:, None])


@triton.jit
def _first_negative(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, wanted: tl.tensor, SIGNED: tl.constexpr
) -> tl.tensor:
    """Whether the first of 32 elements that equals ``wanted`` has a minus sign; [blocks].

    The tile's columns are elements 2i, 2i+1 (a, b) and 16+2i, 17+2i (c, d). Unless ``SIGNED``,
    magnitudes are compared.
    """
    i = tl.arange(0, 8)[None, :] * 2
    wanted = wanted[:, None]
    place = tl.where((a if SIGNED else tl.abs(a)) == wanted, i, 99)
    place = tl.minimum(place, tl.where((b if SIGNED else tl.abs(b)) == wanted, i + 1, 99))
    place = tl.minimum(place, tl.where((c if SIGNED else tl.abs(c)) == wanted, i + 16, 99))
    place = tl.minimum(place, tl.where((d if SIGNED else tl.abs(d)) == wanted, i + 17, 99))
    first = tl.min(place, axis=1)[:, None]
    minus = tl.where((first == i) & (bits(a) < 0), 1, 0)
    minus = minus | tl.where((first == i + 1) & (bits(b) < 0), 1, 0)
    minus = minus | tl.where((first == i + 16) & (bits(c) < 0), 1, 0)
    minus = minus | tl.where((first == i + 17) & (bits(d) < 0), 1, 0)
    return tl.max(minus, axis=1) != 0


@triton.jit
def _store_fifth(
    out: tl.tensor,
    at: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    here: tl.tensor,
) -> None:
    """Bit j of 32 has the fifth bit of level j."""
    i = tl.arange(0, 8)[None, :] * 2
    low = tl.sum((a >> 4 & 1) << i | (b >> 4 & 1) << (i + 1), axis=1)
    high = tl.sum((c >> 4 & 1) << i | (d >> 4 & 1) << (i + 1), axis=1)
    store_half(out, at, low, here)
    store_half(out, at + 2, high, here)


@triton.jit
def _level(x: tl.tensor, inverse: tl.tensor, TOP: tl.constexpr) -> tl.tensor:
    """Q4_0 and Q5_0: truncate x/d + TOP + 0.5, at most 2*TOP - 1."""
    return tl.minimum(to_int8(x * inverse + (TOP + 0.5)), 2 * TOP - 1)


@triton.jit
def _level_above(x: tl.tensor, m: tl.tensor, inverse: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Q4_1 and Q5_1: truncate (x - m)/d + 0.5; only the reference's Q4_1 has a limit."""
    q = to_int8((x - m) * inverse + 0.5)
    return clip(q, -128, 15) if BITS == 4 else q


@triton.jit
def encode_legacy(
    x: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    FLOAT: tl.constexpr,
    BITS: tl.constexpr,
    MINIMUM: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Q4_0, Q5_0 (scale from the signed absmax), or with a minimum Q4_1, Q5_1."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = block < blocks
    i = tl.arange(0, 8)[None, :]
    a, b = load_pair(x, block[:, None] * 16 + i, here[:, None], FLOAT)
    c, e = load_pair(x, block[:, None] * 16 + 8 + i, here[:, None], FLOAT)
    most = tl.maximum(
        tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(e))
    )
    amax = tl.max(most, axis=1)
    flag_odd(bad, amax)
    size: tl.constexpr = 2 + (2 if MINIMUM else 0) + (4 if BITS == 5 else 0) + 16
    at = block * size
    if MINIMUM:
        low = tl.min(tl.minimum(tl.minimum(a, b), tl.minimum(c, e)), axis=1)
        high = tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, e)), axis=1)
        minus = _first_negative(a, b, c, e, low, True)
        m = tl.where(low == 0, from_bits(tl.where(minus, -2147483648, 0)), low)
        d = tl.where(high == low, 0.0, high - low)
        d = tl.div_rn(d, tl.zeros_like(d) + ((1 << BITS) - 1) * 1.0)
        m_code, _ = half(m)
        store_half(out, at + 2, m_code, here)
        inverse = safe_inverse(d)[:, None]
        m = m[:, None]
        qa = _level_above(a, m, inverse, BITS)
        qb = _level_above(b, m, inverse, BITS)
        qc = _level_above(c, m, inverse, BITS)
        qe = _level_above(e, m, inverse, BITS)
    else:
        top: tl.constexpr = 1 << (BITS - 1)
        minus = _first_negative(a, b, c, e, amax, False) & (amax > 0)
        value = tl.where(minus, negative(amax), amax)
        d = tl.div_rn(value, tl.zeros_like(value) - top * 1.0)
        inverse = safe_inverse(d)[:, None]
        qa = _level(a, inverse, top)
        qb = _level(b, inverse, top)
        qc = _level(c, inverse, top)
        qe = _level(e, inverse, top)
    code, _ = half(d)
    store_half(out, at, code, here)
    if BITS == 5:
        _store_fifth(out, at + size - 20, qa, qb, qc, qe, here)
    two = (qa & 15) | (qc & 15) << 4 | (qb & 15) << 8 | (qe & 15) << 12
    place = (at // 2)[:, None] + (size - 16) // 2 + i
    tl.store(out + place, two.to(tl.int16), mask=here[:, None])
