"""Q2_K .. Q6_K as array programs (numpy or torch); see ``search`` for the conventions.

A super-block of 256 elements is a column; its sub-blocks are quantized one after the other for
all columns at once, then their scales. Source of the algorithms: ggml's K-quant encoders (own
implementation); ``native/kquants.hpp`` is the fast form.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .pack import (
    assemble,
    columns,
    crumbs,
    error_weights,
    half,
    larger,
    nibbles,
    planes,
    scaled,
    spread,
)
from .search import (
    EPSILON,
    WITH_IMPORTANCE,
    Array,
    Asymmetric,
    Steps,
    Symmetric,
    backend,
    clip,
    descend_symmetric,
    divided,
    nearest,
    over,
    peak,
    root,
    search_asymmetric,
    search_positive,
    search_symmetric,
    sum_squares,
    total,
)

_PLAIN = {2: Steps(-0.5, 0.1, 15, True), 4: Steps(-1.0, 0.1, 20), 5: Steps(-0.5, 0.1, 15)}


def _weights(x: Array, importance: Array | None, bits: int, pure: bool) -> tuple[Array, Array]:
    """Error weights [256, blocks] and their sums per sub-block."""
    xp, size = backend(x), 16 if bits < 4 else 32
    if importance is not None:
        mean = sum_squares(x) if bits == 2 else 2 * sum_squares(x)
        w = error_weights(x, spread(importance, x.shape[1] * 256 // importance.shape[0], 256),
                          mean / 256, pure=pure)  # fmt: skip
    elif bits == 2:
        w = xp.abs(x)
    else:
        parts = x.reshape(-1, 32, x.shape[1])
        rms = root(xp.stack([sum_squares(p) for p in parts]) / 32)
        w = (rms[:, None] + xp.abs(parts)).reshape(x.shape)
    return w, xp.stack([total(w[i : i + size]) for i in range(0, 256, size)])


def _round_scales(values: Array, top: int) -> tuple[Array, Array]:
    """Levels of non-negative scales by the largest one; returns the step and byte levels."""
    xp = backend(values)
    most = larger(values)
    up = xp.where(
        most > 0, over(top, xp.where(most > 0, most, xp.ones_like(most))), xp.zeros_like(most)
    )
    return divided(most, top), nearest(up * values) & 255


def _requantize(x: Array, d: Array, m: Array, found: Asymmetric) -> Array:
    xp = backend(x)
    q = clip(nearest((x + m) / d), 0, found.top)
    keep = d == 0
    return xp.where(keep, found.levels(x), q) if bool(keep.any()) else q


def _asymmetric(
    x: Array, importance: Array | None, bits: int, pure: bool
) -> tuple[list[Asymmetric], Array, Array, Array]:
    """Search every sub-block; returns the results, scales, minima and weight sums."""
    xp, size = backend(x), 16 if bits < 4 else 32
    w, sums = _weights(x, importance, bits, pure)
    steps = WITH_IMPORTANCE if importance is not None else _PLAIN[bits]
    found = [
        search_asymmetric(x[i : i + size], w[i : i + size], (1 << bits) - 1, steps)
        for i in range(0, 256, size)
    ]
    return found, xp.stack([f.scale for f in found]), xp.stack([f.minimum for f in found]), sums


def _six_bits(ls: Array, lm: Array) -> tuple[Array, Array, Array]:
    """Pack 8 scales and minima in 12 bytes; also returns both as a reader unpacks them."""
    xp = backend(ls)
    a = (ls[:4] | ls[4:] >> 4 << 6) & 255
    b = (lm[:4] | lm[4:] >> 4 << 6) & 255
    c = (ls[4:] & 15) | (lm[4:] & 15) << 4
    scale = xp.concatenate([a & 63, (c & 15) | a >> 6 << 4])
    low = xp.concatenate([b & 63, c >> 4 | b >> 6 << 4])
    return xp.concatenate([a, b, c]), scale, low


def _encode_q45(rows: Array, importance: Array | None, bits: int, pure: bool) -> Array:
    x = columns(rows, 256)
    xp = backend(x)
    found, scale, low, sums = _asymmetric(x, importance, bits, pure)
    if importance is None:
        d, ls = _round_scales(scale, 63)
        m, lm = _round_scales(low, 63)
    else:
        d, ls = search_positive(scale, sums, 63)
        m, lm = search_positive(low, sums, 63)
    if importance is None or bits == 5 or pure:
        ls, lm = clip(ls, 0, 63), clip(lm, 0, 63)
    d_bytes, d = half(d)
    m_bytes, m = half(m)
    packed, ls, lm = _six_bits(ls, lm)
    ds, ms = scaled(ls, d), scaled(lm, m)
    q = xp.concatenate(
        [_requantize(x[32 * j : 32 * j + 32], ds[j], ms[j], found[j]) for j in range(8)]
    )
    high = [planes(q >> 4)] if bits == 5 else []
    return assemble([d_bytes, m_bytes, packed, *high, nibbles(q, 64)], rows.shape[0])


def encode_q4_k(x: Array, importance: Array | None, pure: bool = False) -> Array:
    """Q4_K: 8 sub-blocks of 32, six-bit scales and minima."""
    return _encode_q45(x, importance, 4, pure)


def encode_q5_k(x: Array, importance: Array | None, pure: bool = False) -> Array:
    """Q5_K: as Q4_K with a fifth bit per element."""
    return _encode_q45(x, importance, 5, pure)


def encode_q2_k(rows: Array, importance: Array | None, pure: bool = False) -> Array:
    """Q2_K: 16 sub-blocks of 16, four-bit scales and minima."""
    x = columns(rows, 256)
    xp = backend(x)
    found, scale, low, sums = _asymmetric(x, importance, 2, pure)
    if importance is None:
        d, ls = _round_scales(scale, 15)
        m, lm = _round_scales(low, 15)
    else:
        d, ls = search_positive(scale, sums, 15)
        m, lm = search_positive(low, sums, 15)
    if pure:
        ls, lm = clip(ls, 0, 15), clip(lm, 0, 15)
    d_bytes, d = half(d)
    m_bytes, m = half(m)
    packed = (ls | lm << 4) & 255
    ds, ms = scaled(packed & 15, d), scaled(packed >> 4, m)
    q = xp.concatenate(
        [_requantize(x[16 * j : 16 * j + 16], ds[j], ms[j], found[j]) for j in range(16)]
    )
    return assemble([packed, crumbs(q), d_bytes, m_bytes], rows.shape[0])


def _q3_scales(x: Array, importance: Array | None, pure: bool) -> tuple[Array, Array, Array]:
    """Search Q3_K's sub-blocks; returns the block scale, six-bit scales and first levels."""
    xp = backend(x)
    parts = [x[i : i + 16] for i in range(0, 256, 16)]
    if importance is not None:
        full = spread(importance, x.shape[1] * 256 // importance.shape[0], 256)
        w = error_weights(x, full, 2 * sum_squares(x) / 256, pure=pure)
        ws = [w[i : i + 16] for i in range(0, 256, 16)]
        found = [search_symmetric(p, q, 4) for p, q in zip(parts, ws, strict=True)]
        scale = xp.stack([f.scale for f in found])
        outer = search_symmetric(scale, xp.stack([total(q) for q in ws]), 32)
        q = xp.concatenate([f.levels(p) for f, p in zip(found, parts, strict=True)])
        return outer.scale, outer.levels(scale), q
    pairs = [descend_symmetric(p, 4) for p in parts]
    scale, q = xp.stack([p[0] for p in pairs]), xp.concatenate([p[1] for p in pairs])
    _, value = peak(scale)
    some = value != 0
    inverse = over(-32, xp.where(some, value, xp.ones_like(value)))
    wrapped = ((nearest(inverse * scale) + 128) & 255) - 128  # an int8 in the reference
    level = clip(wrapped, -32, 31) + 32
    zero = xp.zeros_like(value)
    return xp.where(some, over(1, inverse), zero), xp.where(some, level, xp.zeros_like(level)), q


def encode_q3_k(rows: Array, importance: Array | None, pure: bool = False) -> Array:
    """Q3_K: 16 sub-blocks of 16, signed six-bit scales, the third bit in a mask."""
    x = columns(rows, 256)
    xp = backend(x)
    d, ls, q = _q3_scales(x, importance, pure)
    d_bytes, d = half(d)
    ds = xp.repeat(scaled(ls - 32, d), 16, 0) if xp.__name__ == "numpy" else (
        scaled(ls - 32, d).repeat_interleave(16, 0)
    )  # fmt: skip
    q = xp.where(ds == 0, q, clip(nearest(x / ds), -4, 3) + 4)
    low = (ls[:8] & 15) | (ls[8:] & 15) << 4
    top = ls >> 4
    high = top[:4] | top[4:8] << 2 | top[8:12] << 4 | top[12:] << 6
    return assemble([planes(q >> 2 & 1), crumbs(q), low, high, d_bytes], rows.shape[0])


def _search_q6(x: Array, importance: Array | None) -> list[Symmetric]:
    parts = [x[i : i + 16] for i in range(0, 256, 16)]
    if importance is None:
        return [search_symmetric(p, p * p, 32) for p in parts]
    full = spread(importance, x.shape[1] * 256 // importance.shape[0], 256)
    return [search_symmetric(p, full[16 * j : 16 * j + 16], 32) for j, p in enumerate(parts)]


def encode_q6_k(rows: Array, importance: Array | None, pure: bool = False) -> Array:
    """Q6_K: 16 sub-blocks of 16 with signed byte scales."""
    x = columns(rows, 256)
    xp = backend(x)
    found = _search_q6(x, importance)
    scale = xp.stack([f.scale for f in found])
    amax, value = peak(scale)
    zero = amax < EPSILON
    inverse = over(-128, xp.where(zero, xp.ones_like(value), value))
    d_bytes, d = half(xp.where(zero, xp.zeros_like(value), over(1, inverse)))
    ls = ((clip(nearest(inverse * scale), -(1 << 30), 127) + 128) & 255) - 128
    ds = scaled(ls, d)
    parts: list[Any] = []
    for j, f in enumerate(found):
        part = x[16 * j : 16 * j + 16]
        q = clip(nearest(part / ds[j]), -32, 31) + 32
        q = xp.where(ds[j] == 0, f.levels(part), q)
        parts.append(xp.where(zero, xp.zeros_like(q), q))
    q = xp.concatenate(parts).reshape(2, 4, 32, -1)
    low = xp.stack([(q[:, 0] & 15) | (q[:, 2] & 15) << 4, (q[:, 1] & 15) | (q[:, 3] & 15) << 4], 1)
    high = q[:, 0] >> 4 | q[:, 1] >> 4 << 2 | q[:, 2] >> 4 << 4 | q[:, 3] >> 4 << 6
    ls = xp.where(zero, xp.zeros_like(ls), ls & 255)
    n = x.shape[1]
    return assemble([low.reshape(128, n), high.reshape(64, n), ls, d_bytes], rows.shape[0])


ENCODERS = {
    "Q2_K": encode_q2_k,
    "Q3_K": encode_q3_k,
    "Q4_K": encode_q4_k,
    "Q5_K": encode_q5_k,
    "Q6_K": encode_q6_k,
}
FULL = {name: partial(encoder, pure=True) for name, encoder in ENCODERS.items()}
