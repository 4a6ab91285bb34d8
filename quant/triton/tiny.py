"""MXFP4, NVFP4, TQ1_0, TQ2_0, Q1_0 and Q2_0: very few levels, scales from the extremes.

Tiles as in ``plain``; only Q1_0 needs a sum in order and has a lane per block. Steps are those of
``..fallback.plain``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arith import bits, clip, from_bits, half, round_away, safe_inverse, to_int
from .lanes import load_pair, load_run, report, store_half, store_words, unstack, word
from .plain import flag_odd, magnitude


@triton.jit
def _e2m1(x: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Nearest doubled E2M1 code for scale ``d``, the smaller one on ties."""
    a = tl.abs(x)
    code = tl.where(a > d * 0.5, 1, 0)
    code = tl.where(a > d * 1.5, 2, code)
    code = tl.where(a > d * 2.5, 3, code)
    code = tl.where(a > d * 3.5, 4, code)
    code = tl.where(a > d * 5.0, 5, code)
    code = tl.where(a > d * 7.0, 6, code)
    code = tl.where(a > d * 10.0, 7, code)
    code = tl.where(d == 0, 0, code)
    return code | tl.where((x < 0) & (code != 0), 8, 0)


@triton.jit
def _floor_log2(a: tl.tensor) -> tl.tensor:
    """floor(log2f(a)) of positive numbers, where log2f is rounded to float32.

    Just below 2**n the logarithm rounds up to n: for a = 2**n * (1 - j / 2**24) if j / 2**24 is at
    most ln 2 times half the distance from n to the float below it, so j <= ln 2 * 2**p, where 2**p
    is the power of two at or below the numbers just under n.
    """
    small = a < 1e-30
    code = bits(tl.where(small, a * 18446744073709551616.0, a))
    n = (code >> 23) - 126 - tl.where(small, 64, 0)
    j = 0x00800000 - (code & 0x007FFFFF)
    power = (bits(tl.where(n > 0, n - 1, -n).to(tl.float32)) >> 23) - 127
    allowed = (45426 << clip(power, 0, 8)) >> 16  # 45426 / 2**16 is ln 2
    up = (n < 0) | (n > 1)
    return tl.where(up & (j <= allowed), n, n - 1)


@triton.jit
def encode_mxfp4(
    x: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    FLOAT: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """MXFP4: a power-of-two scale byte from absmax, then E2M1 nibbles; ``out`` is in bytes."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = block < blocks
    i = tl.arange(0, 8)[None, :]
    a, b = load_pair(x, block[:, None] * 16 + i, here[:, None], FLOAT)
    c, d = load_pair(x, block[:, None] * 16 + 8 + i, here[:, None], FLOAT)
    most = tl.maximum(
        tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(d))
    )
    amax = tl.max(most, axis=1)
    flag_odd(bad, amax)
    exponent = (_floor_log2(tl.where(amax > 0, amax, 1.0)) + 125) & 255
    exponent = tl.where(amax > 0, exponent, 0)
    tiny = 0x00200000 * (1 + clip(exponent, 0, 1))
    half_scale = from_bits(tl.where(exponent < 2, tiny, (clip(exponent, 1, 254) - 1) << 23))
    scale = half_scale[:, None]
    first = _e2m1(a, scale) | _e2m1(c, scale) << 4
    second = _e2m1(b, scale) | _e2m1(d, scale) << 4
    both = tl.join(first, second).reshape(BLOCKS, 16)
    tl.store(out + block * 17, exponent.to(tl.int8), mask=here)
    place = block[:, None] * 17 + 1 + tl.arange(0, 16)[None, :]
    tl.store(out + place, both.to(tl.int8), mask=here[:, None])


@triton.jit
def _e4m3(x: tl.tensor) -> tl.tensor:
    """Unsigned E4M3 codes of non-negative numbers, half up; 248 and above become 448 as in ggml."""
    x = tl.where(x > 448.0, 448.0, x)
    code = bits(x)
    exponent = (code >> 23 & 255) - 120
    small = clip(to_int(x * 512.0 + 0.5), 0, 7)
    normal = (exponent << 3) + (code >> 20 & 7) + (code >> 19 & 1)
    normal = tl.where(normal >= 15 << 3, 0x7E, normal)
    return tl.where(x > 0, tl.where(exponent <= 0, small, normal), 0)


@triton.jit
def e4m3_half(code: tl.tensor) -> tl.tensor:
    """Half the value of an unsigned E4M3 code below 127."""
    mantissa = code & 7
    normal = from_bits(((code >> 3) + 119) << 23 | mantissa << 20)
    return tl.where(code < 8, mantissa.to(tl.float32) * 0.0009765625, normal)


@triton.jit
def encode_nvfp4(
    x: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    FLOAT: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """NVFP4: an E4M3 scale (absmax / 6) per 16 elements, then E2M1 nibbles."""
    start = tl.program_id(0) * BLOCKS
    block = start + tl.arange(0, BLOCKS)
    part = start * 4 + tl.arange(0, BLOCKS * 4)
    here = part < blocks * 4
    i = tl.arange(0, 4)[None, :]
    a, b = load_pair(x, part[:, None] * 8 + i, here[:, None], FLOAT)
    c, d = load_pair(x, part[:, None] * 8 + 4 + i, here[:, None], FLOAT)
    most = tl.maximum(
        tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(d))
    )
    amax = tl.max(most, axis=1)
    flag_odd(bad, amax)
    code = _e4m3(tl.div_rn(amax, tl.zeros_like(amax) + 6.0))
    scale = e4m3_half(code)[:, None]
    two = _e2m1(a, scale) | _e2m1(c, scale) << 4
    two = two | _e2m1(b, scale) << 8 | _e2m1(d, scale) << 12
    codes = unstack(code, BLOCKS, 4)
    scales = word(codes[0], codes[1], codes[2], codes[3])
    store_words(out, block * 36, scales, block < blocks, 1, 2)
    place = (part // 4 * 18 + 2 + part % 4 * 4)[:, None] + i
    tl.store(out + place, two.to(tl.int16), mask=here[:, None])


@triton.jit
def _ternary(x: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    return round_away(x * inverse) + 1


@triton.jit
def encode_tq2_0(
    x: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    FLOAT: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """TQ2_0: four ternary values per byte: l, l+32, l+64, l+96 of each 128."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = block < blocks
    i = tl.arange(0, 32)[None, :]
    place = block[:, None] * 128 + i // 16 * 64 + i % 16
    even: tl.tuple = ()
    odd: tl.tuple = ()
    most = tl.zeros([BLOCKS, 32], tl.float32)
    for k in tl.static_range(4):
        a, b = load_pair(x, place + 16 * k, here[:, None], FLOAT)
        most = tl.maximum(most, tl.maximum(magnitude(a), magnitude(b)))
        even = even + (a,)
        odd = odd + (b,)
    amax = tl.max(most, axis=1)
    flag_odd(bad, amax)
    inverse = safe_inverse(amax)[:, None]
    two = tl.zeros([BLOCKS, 32], tl.int32)
    for k in tl.static_range(4):
        two = two | (_ternary(even[k], inverse) & 3) << (2 * k)
        two = two | (_ternary(odd[k], inverse) & 3) << (2 * k + 8)
    tl.store(out + block[:, None] * 33 + i, two.to(tl.int16), mask=here[:, None])
    code, _ = half(amax)
    store_half(out, block * 66 + 64, code, here)


@triton.jit
def _load_trits(
    x: tl.tensor,
    place: tl.tensor,
    here: tl.tensor,
    STRIDE: tl.constexpr,
    N: tl.constexpr,
    FLOAT: tl.constexpr,
) -> tl.tensor:
    """N pairs at a stride (in elements), interleaved as even, odd; and the largest magnitude."""
    values: tl.tuple = ()
    most = tl.zeros(place.shape, tl.float32)
    for k in tl.static_range(N):
        a, b = load_pair(x, place + k * STRIDE // 2, here, FLOAT)
        most = tl.maximum(most, tl.maximum(magnitude(a), magnitude(b)))
        values = values + (a, b)
    return values, tl.max(most, axis=1)


@triton.jit
def _trits(values: tl.tensor, inverse: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """Two bytes of N trits, base 3, first trit most significant, as ceil(v * 256 / 243)."""
    first = tl.zeros(values[0].shape, tl.int32)
    second = first
    for k in tl.static_range(5):
        first = first * 3
        second = second * 3
        if k < N:
            first += _ternary(values[2 * k], inverse)
            second += _ternary(values[2 * k + 1], inverse)
    first = (first * 256 + 242) // 243
    second = (second * 256 + 242) // 243
    return (first & 255 | (second & 255) << 8).to(tl.int16)


@triton.jit
def encode_tq1_0(
    x: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    FLOAT: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """TQ1_0: five trits per byte at strides 32 and 16, then four at stride 4."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = (block < blocks)[:, None]
    at = block[:, None] * 128
    i = tl.arange(0, 16)[None, :]
    j = tl.arange(0, 8)[None, :]
    k = tl.arange(0, 2)[None, :]
    a, most_a = _load_trits(x, at + i, here, 32, 5, FLOAT)
    b, most_b = _load_trits(x, at + 80 + j, here, 16, 5, FLOAT)
    c, most_c = _load_trits(x, at + 120 + k, here, 4, 4, FLOAT)
    amax = tl.maximum(tl.maximum(most_a, most_b), most_c)
    flag_odd(bad, amax)
    inverse = safe_inverse(amax)[:, None]
    place = block[:, None] * 27
    tl.store(out + place + i, _trits(a, inverse, 5), mask=here)
    tl.store(out + place + 16 + j, _trits(b, inverse, 5), mask=here)
    tl.store(out + place + 24 + k, _trits(c, inverse, 4), mask=here)
    code, _ = half(amax)
    store_half(out, block * 54 + 52, code, block < blocks)


@triton.jit
def encode_q2_0(
    x: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    FLOAT: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Q2_0: absmax of 64 elements and four consecutive codes (of -1, 0, 1) per byte."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = block < blocks
    i = tl.arange(0, 8)[None, :]
    values, amax = _load_trits(x, block[:, None] * 32 + 4 * i, here[:, None], 2, 4, FLOAT)
    flag_odd(bad, amax)
    inverse = safe_inverse(amax)[:, None]
    broken = tl.abs(inverse) == float("inf")  # C turns infinity into the lowest integer
    two = tl.zeros([BLOCKS, 8], tl.int32)
    for k in tl.static_range(8):
        q = clip(_ternary(values[k], inverse), 0, 3)
        two = two | tl.where(broken, 0, q) << (2 * k)
    tl.store(out + block[:, None] * 9 + 1 + i, two.to(tl.int16), mask=here[:, None])
    code, _ = half(amax)
    store_half(out, block * 18, code, here)


@triton.jit
def encode_q1_0(
    x: tl.tensor,
    out: tl.tensor,
    bad: tl.tensor,
    blocks: tl.tensor,
    FLOAT: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Q1_0: mean magnitude of 128 elements, summed in order, and their signs."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = block < blocks
    sum_abs = tl.zeros([BLOCKS], tl.float32)
    for i in range(4):
        values = load_run(x, block * 128 + i * 32, here, 32, FLOAT)
        report(bad, values, 32)
        signs = tl.zeros([BLOCKS], tl.int32)
        for e in tl.static_range(32):
            sum_abs += tl.abs(values[e])
            signs = signs | tl.where(values[e] >= 0, 1, 0) << e
        store_words(out, block * 18 + 2 + 4 * i, signs, here, 1, 2)
    code, _ = half(sum_abs * 0.0078125)
    store_half(out, block * 18, code, here)
