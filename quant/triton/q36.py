"""Q3_K and Q6_K: 16 sub-blocks of 16 with signed scales, no minima.

A lane holds one sub-block; see ``kquants``. Steps and bit orders are those of
``..fallback.kquants``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arith import EPSILON, clip, error_weights, half, nearest, over, squares, total
from .kquants import block_mean, crumb_words
from .lanes import (
    FLOAT32,
    load_run,
    merged,
    report,
    spread,
    stack,
    store_half,
    store_words,
    unstack,
    word,
)
from .search import descend_symmetric, peak, search_symmetric, symmetric_level


@triton.jit
def _to_byte(q: tl.tensor) -> tl.tensor:
    """Wrap to int8, as int32."""
    return ((q + 128) & 255) - 128


@triton.jit
def _outer_plain(scale: tl.tensor) -> tl.tensor:
    """The step of 16 signed scales by the largest one, and their levels (0 .. 63)."""
    _, value = peak(scale, 16)
    some = value != 0
    inverse = over(-32.0, tl.where(some, value, 1.0))
    levels: tl.tuple = ()
    for j in tl.static_range(16):
        code = clip(_to_byte(nearest(inverse * scale[j])), -32, 31) + 32
        levels = levels + (tl.where(some, code, 0),)
    return tl.where(some, over(1.0, inverse), 0.0), levels


@triton.jit
def _outer_weighted(scale: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """The same by a weighted search."""
    d, inverse, zero = search_symmetric(scale, sums, 32, 16)
    levels: tl.tuple = ()
    for j in tl.static_range(16):
        levels = levels + (symmetric_level(scale[j], inverse, zero, 32),)
    return d, levels


@triton.jit
def _store_scales(
    out: tl.tensor, at: tl.tensor, l: tl.tensor, here: tl.tensor, BLOCKS: tl.constexpr
) -> None:
    """Six-bit scales of 16 sub-blocks in 12 bytes."""
    low: tl.tuple = ()
    for j in tl.static_range(8):
        low = low + ((l[j] & 15) | (l[j + 8] & 15) << 4,)
    high: tl.tuple = ()
    for j in tl.static_range(4):
        top = l[j] >> 4 | (l[j + 4] >> 4) << 2 | (l[j + 8] >> 4) << 4 | (l[j + 12] >> 4) << 6
        high = high + (top,)
    a = word(low[0], low[1], low[2], low[3])
    b = word(low[4], low[5], low[6], low[7])
    store_words(out, at, stack((a, b), BLOCKS, 2), here, 2, 2)
    store_words(out, at + 8, word(high[0], high[1], high[2], high[3]), here, 1, 2)


@triton.jit
def _high_words(q: tl.tensor, sub: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """Third bits in words: bit k of byte m has that of element 32k + m."""
    words: tl.tuple = ()
    for i in tl.static_range(4):
        high = word(q[4 * i] >> 2, q[4 * i + 1] >> 2, q[4 * i + 2] >> 2, q[4 * i + 3] >> 2)
        words = words + (high << (sub // 2),)
    by_sub = stack(words, BLOCKS * 16, 4).reshape(BLOCKS, 8, 8)
    return merged(tl.permute(by_sub, (0, 2, 1)).reshape(BLOCKS * 64), BLOCKS * 8, 8)


@triton.jit
def encode_q3_k(
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
    """Q3_K: BLOCKS super-blocks per program."""
    start = tl.program_id(0) * BLOCKS
    block = start + tl.arange(0, BLOCKS)
    lane = start * 16 + tl.arange(0, BLOCKS * 16)
    here = lane < blocks * 16
    values = load_run(x, lane * 16, here, 16, FLOAT)
    report(bad, values, 16)
    own: tl.tuple = ()
    if WEIGHTED:
        mean = values[0]
        if not PURE:
            mean = spread(block_mean(x, block, block < blocks, 2.0, FLOAT), BLOCKS, 16)
        columns = load_run(importance, (lane * 16) % cols, here, 16, FLOAT32)
        w = error_weights(values, columns, mean, 16, PURE)
        scale, inverse, zero = search_symmetric(values, w, 4, 16)
        for e in tl.static_range(16):
            own = own + (symmetric_level(values[e], inverse, zero, 4),)
        sums = unstack(total(w, 16), BLOCKS, 16)
        d, ls = _outer_weighted(unstack(scale, BLOCKS, 16), sums)
    else:
        scale, own = descend_symmetric(values, 4, 16)
        d, ls = _outer_plain(unstack(scale, BLOCKS, 16))
    d_code, d = half(d)
    at = block * 110
    store_half(out, at + 108, d_code, block < blocks)
    _store_scales(out, at + 96, ls, block < blocks, BLOCKS)
    step = spread(d, BLOCKS, 16) * (stack(ls, BLOCKS, 16) - 32).to(tl.float32)
    q: tl.tuple = ()
    for e in tl.static_range(16):
        new = clip(nearest(tl.div_rn(values[e], step)), -4, 3) + 4
        q = q + (tl.where(step == 0, own[e], new),)
    store_words(out, at, _high_words(q, lane % 16, BLOCKS), block < blocks, 8, 2)
    store_words(out, at + 32, crumb_words(q, BLOCKS), block < blocks, 16, 2)


@triton.jit
def _low_words(q: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """Low nibbles in words: per 128, byte l has elements l and l+64, byte l+32 the others."""
    words: tl.tuple = ()
    for i in tl.static_range(4):
        four = word(q[4 * i] & 15, q[4 * i + 1] & 15, q[4 * i + 2] & 15, q[4 * i + 3] & 15)
        # Sub-blocks in order: (half of 256, half of 128, run of 32, half of 32).
        by_sub = tl.permute(four.reshape(BLOCKS, 2, 2, 2, 2), (0, 1, 3, 4, 2))
        low, high = tl.split(by_sub)
        words = words + ((low | high << 4).reshape(BLOCKS * 8),)
    return stack(words, BLOCKS * 8, 4)


@triton.jit
def encode_q6_k(
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
    """Q6_K: BLOCKS super-blocks per program."""
    start = tl.program_id(0) * BLOCKS
    block = start + tl.arange(0, BLOCKS)
    lane = start * 16 + tl.arange(0, BLOCKS * 16)
    here = lane < blocks * 16
    values = load_run(x, lane * 16, here, 16, FLOAT)
    report(bad, values, 16)
    if WEIGHTED:
        w = load_run(importance, (lane * 16) % cols, here, 16, FLOAT32)
    else:
        w = squares(values, 16)
    scale, own_inverse, own_zero = search_symmetric(values, w, 32, 16)
    scales = unstack(scale, BLOCKS, 16)
    amax, value = peak(scales, 16)
    zero = amax < EPSILON
    inverse = over(-128.0, tl.where(zero, 1.0, value))
    d_code, d = half(tl.where(zero, 0.0, over(1.0, inverse)))
    ls: tl.tuple = ()
    for j in tl.static_range(16):
        code = _to_byte(tl.minimum(nearest(inverse * scales[j]), 127))
        ls = ls + (tl.where(zero, 0, code),)
    words: tl.tuple = ()
    for i in tl.static_range(4):
        a = word(ls[4 * i] & 255, ls[4 * i + 1] & 255, ls[4 * i + 2] & 255, ls[4 * i + 3] & 255)
        words = words + (a,)
    at = block * 210
    store_words(out, at + 192, stack(words, BLOCKS, 4), block < blocks, 4, 2)
    store_half(out, at + 208, d_code, block < blocks)
    step = spread(d, BLOCKS, 16) * stack(ls, BLOCKS, 16).to(tl.float32)
    empty = spread(zero.to(tl.int32), BLOCKS, 16) != 0
    q: tl.tuple = ()
    top: tl.tuple = ()
    for e in tl.static_range(16):
        new = clip(nearest(tl.div_rn(values[e], step)), -32, 31) + 32
        own = symmetric_level(values[e], own_inverse, own_zero, 32)
        code = tl.where(empty, 0, tl.where(step == 0, own, new))
        q = q + (code,)
        top = top + (code >> 4,)
    store_words(out, at, _low_words(q, BLOCKS), block < blocks, 32, 2)
    store_words(out, at + 128, crumb_words(top, BLOCKS), block < blocks, 16, 2)
