"""IQ4_NL and IQ4_XS: four-bit indices into a fixed table of 16 values.

A lane holds 32 elements; steps are those of ``..fallback.iq4``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arith import (
    EPSILON,
    clip,
    error_weights,
    half,
    nearest,
    negative,
    over,
    safe_inverse,
    squares,
    sum_squares,
)
from .kquants import block_mean
from .lanes import FLOAT32, load_run, report, spread, stack, store_half, store_words, unstack, word
from .search import peak

VALUES = tl.constexpr((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))


@triton.jit
def _index(x: tl.tensor) -> tl.tensor:
    """Nearest table entry, the upper one on ties: the count of midpoints at or below x."""
    result = tl.zeros_like(x).to(tl.int32)
    for k in tl.static_range(1, 16):
        result = tl.where(x >= (VALUES[k - 1] + VALUES[k]) * 0.5, k, result)
    return result


@triton.jit
def _value(x: tl.tensor) -> tl.tensor:
    """The table's value at that entry."""
    result = tl.zeros_like(x) + VALUES[0]
    for k in tl.static_range(1, 16):
        result = tl.where(x >= (VALUES[k - 1] + VALUES[k]) * 0.5, VALUES[k] * 1.0, result)
    return result


@triton.jit
def _search(x: tl.tensor, w: tl.tensor) -> tl.tensor:
    """Best scale of 32 elements: the plain start, then 15 inverse scales around it."""
    amax, value = peak(x, 32)
    zero = amax < EPSILON
    value = tl.where(zero, 1.0, value)
    scale = tl.zeros_like(value)
    best = scale - 1.0  # below any first result
    start = over(1.0, tl.div_rn(negative(value), tl.zeros_like(value) - 127.0))
    for i in range(16):
        k = tl.cast(i, tl.float32)
        inverse = tl.where(k == 0, start, over(k - 135.0, value))
        qx = tl.zeros_like(value)
        q2 = qx
        for e in tl.static_range(32):
            q = _value(inverse * x[e])
            wq = w[e] * q
            qx += wq * x[e]
            q2 += wq * q
        better = (q2 > 0) & (qx * qx > best * q2)
        fitted = tl.div_rn(qx, q2)
        scale = tl.where(better, fitted, scale)
        best = tl.where(better, fitted * qx, best)
    return tl.where(zero, 0.0, scale)


@triton.jit
def _nibbles(x: tl.tensor, inverse: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    """Indices of 32 elements per lane in four words: byte j has elements j and j + 16."""
    words: tl.tuple = ()
    for i in tl.static_range(4):
        q: tl.tuple = ()
        for j in tl.static_range(4):
            low = _index(inverse * x[4 * i + j])
            q = q + (low | _index(inverse * x[4 * i + j + 16]) << 4,)
        words = words + (word(q[0], q[1], q[2], q[3]),)
    return stack(words, LANES, 4)


@triton.jit
def encode_iq4_nl(
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
    """IQ4_NL: one float16 scale per 32 elements."""
    lane = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = lane < blocks
    values = load_run(x, lane * 32, here, 32, FLOAT)
    report(bad, values, 32)
    if WEIGHTED:
        columns = load_run(importance, (lane * 32) % cols, here, 32, FLOAT32)
        mean = sum_squares(values, 32) * 0.0625
        w = error_weights(values, columns, mean, 32, PURE)
    else:
        w = squares(values, 32)
    d = _search(values, w)
    code, stored = half(d)
    at = lane * 18
    store_half(out, at, code, here)
    words = _nibbles(values, safe_inverse(stored if PURE else d), BLOCKS)
    store_words(out, at + 2, words, here, 4, 2)


@triton.jit
def encode_iq4_xs(
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
    """IQ4_XS: eight six-bit scales per 256 elements."""
    start = tl.program_id(0) * BLOCKS
    block = start + tl.arange(0, BLOCKS)
    lane = start * 8 + tl.arange(0, BLOCKS * 8)
    here = lane < blocks * 8
    values = load_run(x, lane * 32, here, 32, FLOAT)
    report(bad, values, 32)
    if WEIGHTED:
        mean = values[0]
        if not PURE:
            mean = spread(block_mean(x, block, block < blocks, 2.0, FLOAT), BLOCKS, 8)
        columns = load_run(importance, (lane * 32) % cols, here, 32, FLOAT32)
        w = error_weights(values, columns, mean, 32, PURE)
    else:
        w = squares(values, 32)
    scales = unstack(_search(values, w), BLOCKS, 8)
    _, value = peak(scales, 8)
    d = negative(value) * 0.03125
    code, stored = half(d)
    if PURE:
        d = stored
    inverse = safe_inverse(d)
    step: tl.tuple = ()
    low = tl.zeros_like(code)
    high = low
    for j in tl.static_range(8):
        q = clip(nearest(inverse * scales[j]), -32, 31)
        step = step + (safe_inverse(d * q.to(tl.float32)),)
        low = low | ((q + 32) & 15) << (4 * j)
        high = high | ((q + 32) >> 4) << (2 * j)
    at = block * 136
    words = stack((code | high << 16, low), BLOCKS, 2)
    store_words(out, at, words, block < blocks, 2, 4)
    nibbles = _nibbles(values, stack(step, BLOCKS, 8), BLOCKS * 8)
    store_words(out, at + 8, nibbles, block < blocks, 32, 4)
