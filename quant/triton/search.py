"""The scale searches, one lane per (sub-)block; elements and weights are tuples.

Each is the algorithm of the same name in ``..fallback.search``, step for step, so the results
have the same bits. The loop over trial scales stays a loop on the device; the one over elements
is unrolled and its values stay in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arith import EPSILON, clip, finite_or_zero, level, nearest, negative, over


@triton.jit
def peak(x: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """The largest magnitude and the first signed value that has it."""
    amax = tl.zeros_like(x[0])
    value = amax
    for e in tl.static_range(N):
        a = tl.abs(x[e])
        more = a > amax
        amax = tl.where(more, a, amax)
        value = tl.where(more, x[e], value)
    return amax, value


@triton.jit
def _fit(
    x: tl.tensor, w: tl.tensor, inverse: tl.tensor, TOP: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    lx = tl.zeros_like(x[0])
    l2 = lx
    for e in tl.static_range(N):
        q = level(inverse * x[e], -TOP, TOP - 1)
        lx += w[e] * x[e] * q
        l2 += w[e] * q * q
    return lx, l2


@triton.jit
def search_symmetric(x: tl.tensor, w: tl.tensor, TOP: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Best signed scale for levels -TOP .. TOP-1; also its inverse and which lanes are zero."""
    amax, value = peak(x, N)
    zero = amax < EPSILON
    value = tl.where(zero, 1.0, value)
    inverse = over(-TOP * 1.0, value)
    lx, l2 = _fit(x, w, inverse, TOP, N)
    scale = tl.where(l2 != 0, tl.div_rn(lx, l2), 0.0)
    best = scale * lx
    for i in range(18):
        k = tl.where(i < 9, i - 9, i - 8).to(tl.float32)
        trial = over(-(k * 0.1 + TOP), value)
        lx, l2 = _fit(x, w, trial, TOP, N)
        better = (l2 > 0) & (lx * lx > best * l2)
        fitted = tl.div_rn(lx, l2)
        scale = tl.where(better, fitted, scale)
        best = tl.where(better, fitted * lx, best)
        inverse = tl.where(better, trial, inverse)
    return tl.where(zero, 0.0, scale), inverse, zero


@triton.jit
def symmetric_level(
    x: tl.tensor, inverse: tl.tensor, zero: tl.tensor, TOP: tl.constexpr
) -> tl.tensor:
    """The stored level (0 .. 2*TOP-1) of one element under a symmetric result."""
    return tl.where(zero, 0, clip(nearest(inverse * x), -TOP, TOP - 1) + TOP)


@triton.jit
def _error(
    x: tl.tensor,
    w: tl.tensor,
    q: tl.tensor,
    scale: tl.tensor,
    base: tl.tensor,
    MAD: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    error = tl.zeros_like(x[0])
    for e in tl.static_range(N):
        diff = scale * q[e] + base - x[e]
        error += w[e] * (tl.abs(diff) if MAD else diff * diff)
    return error


@triton.jit
def _levels(
    x: tl.tensor, inverse: tl.tensor, base: tl.tensor, TOP: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    # An infinite inverse (a range that is denormal) gives level 0 everywhere, as 0 does.
    inverse = finite_or_zero(inverse)
    q: tl.tuple = ()
    for e in tl.static_range(N):
        q = q + (level(inverse * (x[e] - base), 0, TOP),)
    return q


@triton.jit
def _extremes(x: tl.tensor, w: tl.tensor, N: tl.constexpr) -> tl.tensor:
    low = x[0]
    high = x[0]
    sum_w = w[0]
    sum_x = w[0] * x[0]
    for e in tl.static_range(1, N):
        low = tl.where(x[e] < low, x[e], low)
        high = tl.where(x[e] > high, x[e], high)
        sum_w += w[e]
        sum_x += w[e] * x[e]
    return low, high, sum_w, sum_x


@triton.jit
def search_asymmetric(
    x: tl.tensor,
    w: tl.tensor,
    TOP: tl.constexpr,
    START: tl.constexpr,
    DELTA: tl.constexpr,
    COUNT: tl.constexpr,
    MAD: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """Best x = scale * level - minimum, levels 0 .. TOP, minimum >= 0.

    Tries COUNT + 1 inverse scales; returns the scale, the minimum, and the inverse, base and
    flatness that reproduce the winning levels.
    """
    low, high, sum_w, sum_x = _extremes(x, w, N)
    base = tl.where(low > 0, 0.0, low)
    flat = high <= base
    inverse = over(TOP * 1.0, high - base)
    found_inverse = inverse
    found_base = base
    scale = over(1.0, inverse)
    best = _error(x, w, _levels(x, inverse, base, TOP, N), scale, base, MAD, N)
    for i in range(COUNT + 1):
        k = tl.cast(i, tl.float32)
        inverse = over(k * DELTA + START + TOP, high - base)
        q = _levels(x, inverse, base, TOP, N)
        l = tl.zeros_like(best)
        l2 = l
        xl = l
        for e in tl.static_range(N):
            wl = w[e] * q[e]
            l += wl
            l2 += wl * q[e]
            xl += wl * x[e]
        det = sum_w * l2 - l * l
        this_scale = tl.div_rn(sum_w * xl - sum_x * l, det)
        this_base = tl.div_rn(l2 * sum_x - l * xl, det)
        above = this_base > 0
        this_base = tl.where(above, 0.0, this_base)
        this_scale = tl.where(above, tl.div_rn(xl, l2), this_scale)
        error = _error(x, w, q, this_scale, this_base, MAD, N)
        better = (det > 0) & (error < best) & (flat == 0)
        best = tl.where(better, error, best)
        scale = tl.where(better, this_scale, scale)
        found_inverse = tl.where(better, inverse, found_inverse)
        found_base = tl.where(better, base, found_base)
        base = tl.where(better, this_base, base)
    return tl.where(flat, 0.0, scale), negative(base), found_inverse, found_base, flat


@triton.jit
def asymmetric_level(
    x: tl.tensor, inverse: tl.tensor, base: tl.tensor, flat: tl.tensor, TOP: tl.constexpr
) -> tl.tensor:
    """The winning level (0 .. TOP) of one element under an asymmetric result."""
    return tl.where(flat, 0, clip(nearest(inverse * (x - base)), 0, TOP))


@triton.jit
def _start_positive(
    x: tl.tensor, w: tl.tensor, safe: tl.tensor, TOP: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    """The best of nine inverse scales."""
    inverse = over(TOP * 1.0, safe)
    step = over(1.0, inverse)
    best = tl.zeros_like(safe)
    for e in tl.static_range(N):
        diff = x[e] - step * (nearest(inverse * x[e]) & 255).to(tl.float32)
        best += w[e] * diff * diff
    for i in range(8):
        k = tl.where(i < 4, i - 4, i - 3).to(tl.float32)
        trial = over(k * 0.1 + TOP, safe)
        step = over(1.0, trial)
        error = tl.zeros_like(safe)
        for e in tl.static_range(N):
            diff = x[e] - step * tl.minimum(nearest(trial * x[e]), TOP).to(tl.float32)
            error += w[e] * diff * diff
        better = error < best
        best = tl.where(better, error, best)
        inverse = tl.where(better, trial, inverse)
    return inverse


@triton.jit
def search_positive(x: tl.tensor, w: tl.tensor, TOP: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Quantize positive values (a super-block's scales): the scale and a tuple of byte levels."""
    most = tl.zeros_like(x[0])
    for e in tl.static_range(N):
        most = tl.where(x[e] > most, x[e], most)
    zero = most < EPSILON
    inverse = _start_positive(x, w, tl.where(zero, 1.0, most), TOP, N)
    lx = tl.zeros_like(most)
    l2 = lx
    q: tl.tuple = ()
    for e in tl.static_range(N):
        code = tl.minimum(nearest(inverse * x[e]), TOP)
        f = code.to(tl.float32)
        lx += w[e] * x[e] * f
        l2 += w[e] * f * f
        q = q + (code & 255,)
    for _ in range(5):  # a sweep that changes nothing is not repeated in the reference: the same
        moved: tl.tuple = ()
        for e in tl.static_range(N):
            f = q[e].to(tl.float32)
            wx = w[e] * x[e]
            slx = lx - wx * f
            sl2 = l2 - w[e] * f * f
            new = tl.minimum(nearest(tl.div_rn(x[e] * sl2, slx)), TOP)
            g = new.to(tl.float32)
            maybe = (slx > 0) & (sl2 > 0) & (new != q[e])
            slx += wx * g
            sl2 += w[e] * g * g
            maybe = maybe & (slx * slx * l2 > lx * lx * sl2)
            moved = moved + (tl.where(maybe, new & 255, q[e]),)
            lx = tl.where(maybe, slx, lx)
            l2 = tl.where(maybe, sl2, l2)
        q = moved
    levels: tl.tuple = ()
    for e in tl.static_range(N):
        levels = levels + (tl.where(zero, 0, q[e]),)
    return tl.where(zero | ((l2 > 0) == 0), 0.0, tl.div_rn(lx, l2)), levels


@triton.jit
def descend_symmetric(x: tl.tensor, TOP: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Coordinate descent with weights x*x: the scale and a tuple of levels (0 .. 2*TOP-1)."""
    amax, value = peak(x, N)
    zero = amax < EPSILON
    inverse = over(-TOP * 1.0, tl.where(zero, 1.0, value))
    lx = tl.zeros_like(amax)
    l2 = lx
    q: tl.tuple = ()
    for e in tl.static_range(N):
        w = x[e] * x[e]
        f = level(inverse * x[e], -TOP, TOP - 1)
        lx += w * x[e] * f
        l2 += w * f * f
        q = q + (f,)
    for _ in range(5):
        moved: tl.tuple = ()
        for e in tl.static_range(N):
            w = x[e] * x[e]
            wx = w * x[e]
            slx = lx - wx * q[e]
            sl2 = l2 - w * q[e] * q[e]
            new = clip(nearest(tl.div_rn(x[e] * sl2, slx)), -TOP, TOP - 1).to(tl.float32)
            maybe = (slx > 0) & (new != q[e]) & (zero == 0)
            slx += wx * new
            sl2 += w * new * new
            maybe = maybe & (sl2 > 0) & (slx * slx * l2 > lx * lx * sl2)
            moved = moved + (tl.where(maybe, new, q[e]),)
            lx = tl.where(maybe, slx, lx)
            l2 = tl.where(maybe, sl2, l2)
        q = moved
    levels: tl.tuple = ()
    for e in tl.static_range(N):
        levels = levels + (tl.where(zero, 0, q[e].to(tl.int32) + TOP),)
    return tl.where(zero | ((l2 > 0) == 0), 0.0, tl.div_rn(lx, l2)), levels
