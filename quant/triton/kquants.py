"""Q4_K, Q5_K and Q2_K: sub-blocks with scales and minima that are quantized again.

A lane holds one sub-block through its search; the scales of a super-block then meet in one lane
and go back for the final levels. Steps and bit orders are those of ``..fallback.kquants``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arith import (
    clip,
    error_weights,
    half,
    nearest,
    over,
    sum_squares,
    total,
)
from .lanes import (
    FLOAT32,
    load_pair,
    load_run,
    merged,
    report,
    spread,
    stack,
    store_words,
    unstack,
    word,
)
from .search import asymmetric_level, search_asymmetric, search_positive


@triton.jit
def block_mean(
    x: tl.tensor, block: tl.tensor, here: tl.tensor, FACTOR: tl.constexpr, FLOAT: tl.constexpr
) -> tl.tensor:
    """FACTOR times the mean square of each super-block of 256, summed in order."""
    result = tl.zeros(block.shape, tl.float32)
    for i in range(128):
        a, b = load_pair(x, block * 128 + i, here, FLOAT)
        result += a * a
        result += b * b
    return (result * FACTOR) * 0.00390625


@triton.jit
def _plain_weights(x: tl.tensor, BITS: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    w: tl.tuple = ()
    if BITS == 2:
        for e in tl.static_range(N):
            w = w + (tl.abs(x[e]),)
    else:
        rms = tl.sqrt_rn(sum_squares(x, N) * (1.0 / N))
        for e in tl.static_range(N):
            w = w + (rms + tl.abs(x[e]),)
    return w


@triton.jit
def _round_scales(values: tl.tensor, TOP: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Levels of non-negative scales by the largest one; the step and byte levels."""
    most = tl.zeros_like(values[0])
    for e in tl.static_range(N):
        most = tl.where(values[e] > most, values[e], most)
    up = tl.where(most > 0, over(TOP * 1.0, tl.where(most > 0, most, 1.0)), 0.0)
    levels: tl.tuple = ()
    for e in tl.static_range(N):
        levels = levels + (nearest(up * values[e]) & 255,)
    return tl.div_rn(most, tl.zeros_like(most) + TOP), levels


@triton.jit
def _scales(
    values: tl.tensor,
    sums: tl.tensor,
    TOP: tl.constexpr,
    N: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CLAMP: tl.constexpr,
) -> tl.tensor:
    """Quantize a super-block's scales or minima: the step and a tuple of levels."""
    if WEIGHTED:
        d, q = search_positive(values, sums, TOP, N)
    else:
        d, q = _round_scales(values, TOP, N)
    levels: tl.tuple = ()
    for e in tl.static_range(N):
        levels = levels + ((tl.minimum(q[e], TOP) if CLAMP else q[e]),)
    return d, levels


@triton.jit
def _search(
    x: tl.tensor,
    importance: tl.tensor,
    mean: tl.tensor,
    at: tl.tensor,
    cols: tl.tensor,
    here: tl.tensor,
    BITS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PURE: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """The asymmetric search of a sub-block of N, and the sum of its weights."""
    if WEIGHTED:
        w = error_weights(x, load_run(importance, at % cols, here, N, FLOAT32), mean, N, PURE)
        result = search_asymmetric(x, w, (1 << BITS) - 1, -0.9, 0.05, 36, False, N)
    else:
        w = _plain_weights(x, BITS, N)
        if BITS == 4:
            result = search_asymmetric(x, w, 15, -1.0, 0.1, 20, False, N)
        else:
            result = search_asymmetric(x, w, (1 << BITS) - 1, -0.5, 0.1, 15, BITS == 2, N)
    return result, total(w, N)


@triton.jit
def _levels(
    x: tl.tensor, found: tl.tensor, d: tl.tensor, m: tl.tensor, TOP: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    """Levels under rounded scales; where the scale rounded to zero the search's own."""
    q: tl.tuple = ()
    for e in tl.static_range(N):
        own = asymmetric_level(x[e], found[2], found[3], found[4], TOP)
        new = clip(nearest(tl.div_rn(x[e] + m, d)), 0, TOP)
        q = q + (tl.where(d == 0, own, new),)
    return q


@triton.jit
def _six_bits(ls: tl.tensor, lm: tl.tensor) -> tl.tensor:
    """Twelve bytes of 8 scales and minima as three words, and both as a reader unpacks them."""
    a: tl.tuple = ()
    b: tl.tuple = ()
    c: tl.tuple = ()
    for j in tl.static_range(4):
        a = a + ((ls[j] | (ls[j + 4] >> 4) << 6) & 255,)
        b = b + ((lm[j] | (lm[j + 4] >> 4) << 6) & 255,)
        c = c + ((ls[j + 4] & 15) | (lm[j + 4] & 15) << 4,)
    scale: tl.tuple = ()
    low: tl.tuple = ()
    for j in tl.static_range(8):
        if j < 4:
            scale = scale + (a[j] & 63,)
            low = low + (b[j] & 63,)
        else:
            scale = scale + ((c[j - 4] & 15) | (a[j - 4] >> 6) << 4,)
            low = low + (c[j - 4] >> 4 | (b[j - 4] >> 6) << 4,)
    words = (
        word(a[0], a[1], a[2], a[3]),
        word(b[0], b[1], b[2], b[3]),
        word(c[0], c[1], c[2], c[3]),
    )
    return words, scale, low


@triton.jit
def nibble_words(q: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """Levels of 32 per lane in words: byte l of each two sub-blocks has element l of both."""
    words: tl.tuple = ()
    for i in tl.static_range(8):
        nibbles = word(q[4 * i] & 15, q[4 * i + 1] & 15, q[4 * i + 2] & 15, q[4 * i + 3] & 15)
        even, odd = tl.split(nibbles.reshape(BLOCKS * 4, 2))
        words = words + (even | odd << 4,)
    return stack(words, BLOCKS * 4, 8)


@triton.jit
def _fifth_words(q: tl.tensor, sub: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """Fifth bits in words: bit j of byte l has that of element l of sub-block j."""
    words: tl.tuple = ()
    for i in tl.static_range(8):
        fifth = word(q[4 * i] >> 4, q[4 * i + 1] >> 4, q[4 * i + 2] >> 4, q[4 * i + 3] >> 4)
        words = words + (fifth << sub,)
    by_sub = stack(words, BLOCKS * 8, 8).reshape(BLOCKS, 8, 8)
    return merged(tl.permute(by_sub, (0, 2, 1)).reshape(BLOCKS * 64), BLOCKS * 8, 8)


@triton.jit
def encode_q45_k(
    x: tl.tensor,
    importance: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    cols: tl.tensor,
    FLOAT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PURE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Q4_K and Q5_K: BLOCKS super-blocks of 8 sub-blocks of 32 per program."""
    start = tl.program_id(0) * BLOCKS
    block = start + tl.arange(0, BLOCKS)
    lane = start * 8 + tl.arange(0, BLOCKS * 8)
    here = lane < blocks * 8
    values = load_run(x, lane * 32, here, 32, FLOAT)
    report(bad, values, 32)
    if WEIGHTED and not PURE:
        mean = spread(block_mean(x, block, block < blocks, 2.0, FLOAT), BLOCKS, 8)
    else:
        mean = values[0]
    found, sums = _search(values, importance, mean, lane * 32, cols, here, BITS, WEIGHTED, PURE, 32)
    weights = unstack(sums, BLOCKS, 8)
    clamp: tl.constexpr = (not WEIGHTED) or PURE or BITS == 5
    d, ls = _scales(unstack(found[0], BLOCKS, 8), weights, 63, 8, WEIGHTED, clamp)
    m, lm = _scales(unstack(found[1], BLOCKS, 8), weights, 63, 8, WEIGHTED, clamp)
    d_code, d = half(d)
    m_code, m = half(m)
    words, ls, lm = _six_bits(ls, lm)
    size: tl.constexpr = 144 if BITS == 4 else 176
    at = block * size
    words = stack((d_code | m_code << 16, words[0], words[1], words[2]), BLOCKS, 4)
    store_words(out, at, words, block < blocks, 4, 4)
    d = spread(d, BLOCKS, 8) * stack(ls, BLOCKS, 8).to(tl.float32)
    m = spread(m, BLOCKS, 8) * stack(lm, BLOCKS, 8).to(tl.float32)
    q = _levels(values, found, d, m, (1 << BITS) - 1, 32)
    if BITS == 5:
        fifth = _fifth_words(q, lane % 8, BLOCKS)
        store_words(out, at + 16, fifth, block < blocks, 8, 4)
    store_words(out, at + size - 128, nibble_words(q, BLOCKS), block < blocks, 32, 4)


@triton.jit
def crumb_words(q: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """Two-bit codes, 16 per lane, in words: byte l of each 128 has l, l+32, l+64, l+96."""
    words: tl.tuple = ()
    for i in tl.static_range(4):
        two = word(q[4 * i] & 3, q[4 * i + 1] & 3, q[4 * i + 2] & 3, q[4 * i + 3] & 3)
        # Sub-blocks in order: (half of 128, run of 32, half of 32); the run moves to the end.
        low, high = tl.split(tl.permute(two.reshape(BLOCKS, 2, 2, 2, 2), (0, 1, 4, 2, 3)))
        a, c = tl.split(low)
        b, d = tl.split(high)
        words = words + ((a | b << 2 | c << 4 | d << 6).reshape(BLOCKS * 4),)
    return stack(words, BLOCKS * 4, 4)


@triton.jit
def encode_q2_k(
    x: tl.tensor,
    importance: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    cols: tl.tensor,
    FLOAT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PURE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Q2_K: BLOCKS super-blocks of 16 sub-blocks of 16 per program."""
    start = tl.program_id(0) * BLOCKS
    block = start + tl.arange(0, BLOCKS)
    lane = start * 16 + tl.arange(0, BLOCKS * 16)
    here = lane < blocks * 16
    values = load_run(x, lane * 16, here, 16, FLOAT)
    report(bad, values, 16)
    if WEIGHTED and not PURE:
        mean = spread(block_mean(x, block, block < blocks, 1.0, FLOAT), BLOCKS, 16)
    else:
        mean = values[0]
    found, sums = _search(values, importance, mean, lane * 16, cols, here, 2, WEIGHTED, PURE, 16)
    weights = unstack(sums, BLOCKS, 16)
    d, ls = _scales(unstack(found[0], BLOCKS, 16), weights, 15, 16, WEIGHTED, PURE)
    m, lm = _scales(unstack(found[1], BLOCKS, 16), weights, 15, 16, WEIGHTED, PURE)
    d_code, d = half(d)
    m_code, m = half(m)
    at = block * 84
    store_words(out, at + 80, d_code | m_code << 16, block < blocks, 1, 4)
    packed: tl.tuple = ()
    for j in tl.static_range(16):
        packed = packed + ((ls[j] | lm[j] << 4) & 255,)
    words: tl.tuple = ()
    for i in tl.static_range(4):
        four = word(packed[4 * i], packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3])
        words = words + (four,)
    store_words(out, at, stack(words, BLOCKS, 4), block < blocks, 4, 4)
    code = stack(packed, BLOCKS, 16)
    d = spread(d, BLOCKS, 16) * (code & 15).to(tl.float32)
    m = spread(m, BLOCKS, 16) * (code >> 4).to(tl.float32)
    q = _levels(values, found, d, m, 3, 16)
    store_words(out, at + 16, crumb_words(q, BLOCKS), block < blocks, 16, 4)
