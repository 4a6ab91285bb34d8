"""Moving elements between memory and lanes: a lane is a (sub-)block and holds it as a tuple.

Tuples keep sums in element order, which no reduction over a tensor axis promises. Elements are
loaded in pairs (one 32- or 64-bit load), so a lane's run is a few wide loads. Scales of the
sub-blocks of a super-block go from one lane each to a tuple per super-block and back.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
FLOAT16 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)


@triton.jit
def _widen(pair: tl.tensor, FLOAT: tl.constexpr) -> tl.tensor:
    """The two elements of pairs (int64 or int32) as float32."""
    if FLOAT == FLOAT32:
        first = pair.to(tl.int32).to(tl.float32, bitcast=True)
        second = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif FLOAT == FLOAT16:
        first = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = (pair << 16).to(tl.float32, bitcast=True)
        second = (pair & -65536).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def load_pair(x: tl.tensor, at: tl.tensor, here: tl.tensor, FLOAT: tl.constexpr) -> tl.tensor:
    """Elements 2*at and 2*at + 1 as float32; ``x`` points to pairs."""
    return _widen(tl.load(x + at, mask=here, other=0), FLOAT)


@triton.jit
def load_run(
    x: tl.tensor, at: tl.tensor, here: tl.tensor, N: tl.constexpr, FLOAT: tl.constexpr
) -> tl.tensor:
    """The N elements from element ``at`` (even) on, as a tuple."""
    pairs = tl.load(
        x + (at // 2)[:, None] + tl.arange(0, N // 2)[None, :], mask=here[:, None], other=0
    )
    columns = unstack(pairs.reshape(at.shape[0] * (N // 2)), at.shape[0], N // 2)
    values: tl.tuple = ()
    for i in tl.static_range(N // 2):
        values = values + _widen(columns[i], FLOAT)
    return values


@triton.jit
def report(bad: tl.tensor, x: tl.tensor, N: tl.constexpr) -> None:
    """Set the flag if a value is not finite."""
    fine = tl.abs(x[0]) < float("inf")
    for e in tl.static_range(1, N):
        fine = fine & (tl.abs(x[e]) < float("inf"))
    one = tl.full(fine.shape, 1, tl.int32)
    tl.store(bad + tl.zeros_like(one), one, mask=fine == 0)


@triton.jit
def store_words(
    out: tl.tensor,
    at: tl.tensor,
    words: tl.tensor,
    here: tl.tensor,
    N: tl.constexpr,
    UNIT: tl.constexpr,
) -> None:
    """Store N 32-bit words per block from byte ``at`` on; ``words`` is [blocks * N].

    ``out`` points to units of 4 bytes, or of 2 for blocks that are not aligned better.
    """
    BLOCKS: tl.constexpr = at.shape[0]
    if UNIT == 4:
        place = (at // 4)[:, None] + tl.arange(0, N)[None, :]
        tl.store(out + place, words.reshape(BLOCKS, N), mask=here[:, None])
    else:
        halves = tl.join((words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16))
        place = (at // 2)[:, None] + tl.arange(0, 2 * N)[None, :]
        tl.store(out + place, halves.reshape(BLOCKS, 2 * N), mask=here[:, None])


@triton.jit
def store_half(out: tl.tensor, at: tl.tensor, code: tl.tensor, here: tl.tensor) -> None:
    """Store 16 bits at byte ``at`` of ``out``, which points to units of 2 bytes."""
    tl.store(out + at // 2, code.to(tl.int16), mask=here)


@triton.jit
def word(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Four bytes, the first lowest."""
    return a | b << 8 | c << 16 | d << 24


@triton.jit
def unstack(x: tl.tensor, BLOCKS: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """[BLOCKS * N] as a tuple of N [BLOCKS], lane N*b + j in entry j."""
    even, odd = tl.split(x.reshape(BLOCKS * N // 2, 2))
    if N == 2:
        return even, odd
    else:
        a = unstack(even, BLOCKS, N // 2)
        b = unstack(odd, BLOCKS, N // 2)
        result: tl.tuple = ()
        for i in tl.static_range(N // 2):
            result = result + (a[i], b[i])
        return result


@triton.jit
def stack(parts: tl.tensor, BLOCKS: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """The inverse of ``unstack``."""
    if N == 2:
        return tl.join(parts[0], parts[1]).reshape(BLOCKS * 2)
    else:
        even: tl.tuple = ()
        odd: tl.tuple = ()
        for i in tl.static_range(N // 2):
            even = even + (parts[2 * i],)
            odd = odd + (parts[2 * i + 1],)
        a = stack(even, BLOCKS, N // 2)
        b = stack(odd, BLOCKS, N // 2)
        return tl.join(a, b).reshape(BLOCKS * N)


@triton.jit
def spread(x: tl.tensor, BLOCKS: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Repeat each of [BLOCKS] for the N lanes of its block."""
    return tl.broadcast_to(x[:, None], [BLOCKS, N]).reshape(BLOCKS * N)


@triton.jit
def merged(x: tl.tensor, BLOCKS: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """OR of the N lanes of each block; [BLOCKS]."""
    parts = unstack(x, BLOCKS, N)
    result = parts[0]
    for j in tl.static_range(1, N):
        result = result | parts[j]
    return result
