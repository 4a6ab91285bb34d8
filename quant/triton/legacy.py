"""Q4_0, Q4_1, Q5_0, Q5_1 under importance: weighted searches, a lane per block of 32.

The error weights need the mean square of the whole row, summed in order, which ``row_means``
finds first. Without importance see ``plain``. Steps are those of ``..fallback.legacy``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arith import error_weights, half, negative
from .lanes import FLOAT32, load_run, report, stack, store_words, word
from .lanes import store_half as store_two
from .search import (
    asymmetric_level,
    search_asymmetric,
    search_symmetric,
    symmetric_level,
)


@triton.jit
def row_means(
    x: tl.tensor,
    means: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Mean square of each row, summed in order; float32 [rows]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    result = tl.zeros([ROWS], tl.float32)
    for i in range(cols // 32):
        values = load_run(x, row * cols + i * 32, row < rows, 32, FLOAT)
        for e in tl.static_range(32):
            result += values[e] * values[e]
    mean = tl.div_rn(result, tl.zeros_like(result) + tl.cast(cols, tl.float32))
    tl.store(means + row, mean, mask=row < rows)


@triton.jit
def _packed(q: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    """Nibbles of 32 levels per lane in four words: byte j has elements j and j + 16."""
    words: tl.tuple = ()
    for i in tl.static_range(4):
        b: tl.tuple = ()
        for j in tl.static_range(4):
            b = b + ((q[4 * i + j] & 15) | (q[4 * i + j + 16] & 15) << 4,)
        words = words + (word(b[0], b[1], b[2], b[3]),)
    return stack(words, LANES, 4)


@triton.jit
def _fifth(q: tl.tensor) -> tl.tensor:
    """Bit j has the fifth bit of level j."""
    result = tl.zeros_like(q[0])
    for e in tl.static_range(32):
        result = result | (q[e] >> 4 & 1) << e
    return result


@triton.jit
def encode_weighted(
    x: tl.tensor,
    importance: tl.tensor,
    means: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    cols: tl.tensor,
    FLOAT: tl.constexpr,
    BITS: tl.constexpr,
    MINIMUM: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Q4_0, Q5_0, or with a minimum Q4_1, Q5_1: BLOCKS blocks per program."""
    lane = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = lane < blocks
    values = load_run(x, lane * 32, here, 32, FLOAT)
    report(bad, values, 32)
    columns = load_run(importance, (lane * 32) % cols, here, 32, FLOAT32)
    mean = tl.load(means + (lane * 32) // cols, mask=here, other=0.0)
    w = error_weights(values, columns, mean, 32, False)
    q: tl.tuple = ()
    unit: tl.constexpr = 4 if MINIMUM else 2
    size: tl.constexpr = 2 + (2 if MINIMUM else 0) + (4 if BITS == 5 else 0) + 16
    at = lane * size
    if MINIMUM:
        top: tl.constexpr = (1 << BITS) - 1
        d, m, inverse, base, flat = search_asymmetric(values, w, top, -0.9, 0.05, 36, False, 32)
        for e in tl.static_range(32):
            q = q + (asymmetric_level(values[e], inverse, base, flat, top),)
        d_code, _ = half(d)
        m_code, _ = half(negative(m))
        store_words(out, at, d_code | m_code << 16, here, 1, 4)
    else:
        reach: tl.constexpr = 1 << (BITS - 1)
        d, inverse, zero = search_symmetric(values, w, reach, 32)
        for e in tl.static_range(32):
            q = q + (symmetric_level(values[e], inverse, zero, reach),)
        d_code, _ = half(d)
        store_two(out, at, d_code, here)
    if BITS == 5:
        store_words(out, at + size - 20, _fifth(q), here, 1, unit)
    store_words(out, at + size - 16, _packed(q, BLOCKS), here, 4, unit)
