"""The value of one element of a block, per format: what ``decode`` evaluates for every element.

Each function takes the bytes, the byte where the element's block starts and the element's place
in it, and does the float operations of ``native/decode.hpp`` in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arith import from_bits, negative
from .iq4 import VALUES
from .tiny import e4m3_half


@triton.jit
def _byte(data: tl.tensor, at: tl.tensor) -> tl.tensor:
    return tl.load(data + at).to(tl.int32)


@triton.jit
def _half(data: tl.tensor, at: tl.tensor) -> tl.tensor:
    code = _byte(data, at) | _byte(data, at + 1) << 8
    return code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nibble(data: tl.tensor, at: tl.tensor, j: tl.tensor, RUN: tl.constexpr) -> tl.tensor:
    """Element j of a run whose first half are low nibbles, the second high ones."""
    return _byte(data, at + j % RUN) >> (j // RUN * 4) & 15


@triton.jit
def _legacy(
    data: tl.tensor, at: tl.tensor, j: tl.tensor, BITS: tl.constexpr, MINIMUM: tl.constexpr
) -> tl.tensor:
    skip: tl.constexpr = 4 if MINIMUM else 2
    d = _half(data, at)
    if BITS == 5:
        q = _nibble(data, at + skip + 4, j, 16)
        q = q | (_byte(data, at + skip + j // 8) >> (j % 8) & 1) << 4
    else:
        q = _nibble(data, at + skip, j, 16)
    if MINIMUM:
        return q.to(tl.float32) * d + _half(data, at + 2)
    else:
        return (q - (1 << (BITS - 1))).to(tl.float32) * d


@triton.jit
def q4_0(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q4_0."""
    return _legacy(data, at, j, 4, False)


@triton.jit
def q4_1(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q4_1."""
    return _legacy(data, at, j, 4, True)


@triton.jit
def q5_0(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q5_0."""
    return _legacy(data, at, j, 5, False)


@triton.jit
def q5_1(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q5_1."""
    return _legacy(data, at, j, 5, True)


@triton.jit
def _signed(code: tl.tensor) -> tl.tensor:
    """A byte as int8, in float32."""
    return (((code + 128) & 255) - 128).to(tl.float32)


@triton.jit
def q8_0(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q8_0."""
    return _signed(_byte(data, at + 2 + j)) * _half(data, at)


@triton.jit
def _crumb(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Two bits of 256: byte l of each 128 has elements l, l+32, l+64, l+96."""
    return _byte(data, at + j // 128 * 32 + j % 32) >> (j % 128 // 32 * 2) & 3


@triton.jit
def q2_k(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q2_K."""
    scale = _byte(data, at + j // 16)
    d = _half(data, at + 80) * (scale & 15).to(tl.float32)
    m = _half(data, at + 82) * (scale >> 4).to(tl.float32)
    return d * _crumb(data, at + 16, j).to(tl.float32) - m


@triton.jit
def q3_k(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q3_K."""
    g = j // 16
    low = _byte(data, at + 96 + g % 8) >> (g // 8 * 4) & 15
    high = _byte(data, at + 104 + g % 4) >> (g // 4 * 2) & 3
    d = _half(data, at + 108) * ((low | high << 4) - 32).to(tl.float32)
    bit = _byte(data, at + j % 32) >> (j // 32) & 1
    return d * (_crumb(data, at + 32, j) - 4 + 4 * bit).to(tl.float32)


@triton.jit
def _q45(data: tl.tensor, at: tl.tensor, j: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    g = j // 32
    first = g < 4
    packed = _byte(data, at + 4 + tl.where(first, g, g + 4))  # scale, or both low nibbles
    above = _byte(data, at + 4 + tl.where(first, g + 4, g - 4))  # minimum, or the scale's top
    top = _byte(data, at + 4 + g)
    scale = tl.where(first, packed & 63, packed & 15 | (above >> 6) << 4)
    low = tl.where(first, above & 63, packed >> 4 | (top >> 6) << 4)
    d = _half(data, at) * scale.to(tl.float32)
    m = _half(data, at + 2) * low.to(tl.float32)
    l = j % 32
    q = _byte(data, at + (16 if BITS == 4 else 48) + g // 2 * 32 + l) >> (g % 2 * 4) & 15
    if BITS == 5:
        q += (_byte(data, at + 16 + l) >> g & 1) << 4
    return d * q.to(tl.float32) - m


@triton.jit
def q4_k(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q4_K."""
    return _q45(data, at, j, 4)


@triton.jit
def q5_k(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q5_K."""
    return _q45(data, at, j, 5)


@triton.jit
def q6_k(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q6_K."""
    part = j % 128 // 32
    low = _byte(data, at + j // 128 * 64 + part % 2 * 32 + j % 32) >> (part // 2 * 4) & 15
    high = _crumb(data, at + 128, j)
    d = _half(data, at + 208) * _signed(_byte(data, at + 192 + j // 16))
    return d * ((low | high << 4) - 32).to(tl.float32)


@triton.jit
def _entry(code: tl.tensor) -> tl.tensor:
    """The IQ4 table's value."""
    result = tl.zeros_like(code).to(tl.float32) + VALUES[0]
    for k in tl.static_range(1, 16):
        result = tl.where(code == k, VALUES[k] * 1.0, result)
    return result


@triton.jit
def iq4_nl(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """IQ4_NL."""
    return _half(data, at) * _entry(_nibble(data, at + 2, j, 16))


@triton.jit
def iq4_xs(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """IQ4_XS."""
    g = j // 32
    low = _byte(data, at + 4 + g // 2) >> (g % 2 * 4) & 15
    high = _byte(data, at + 2 + g // 4) >> (g % 4 * 2) & 3
    d = _half(data, at) * ((low | high << 4) - 32).to(tl.float32)
    return d * _entry(_nibble(data, at + 8 + 16 * g, j % 32, 16))


@triton.jit
def _e2m1(code: tl.tensor) -> tl.tensor:
    """Doubled E2M1: 0 1 2 3 4 6 8 12 and their negatives; code 8 is a plain zero."""
    e = code & 7
    value = tl.where(e < 4, e, tl.where(e < 6, 2 * e - 4, 4 * e - 16))
    return tl.where(code < 8, value, -value).to(tl.float32)


@triton.jit
def mxfp4(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """MXFP4."""
    e = _byte(data, at)
    d = from_bits(tl.where(e < 2, 0x00200000 << tl.minimum(e, 1), (e - 1) << 23))
    return d * _e2m1(_nibble(data, at + 1, j, 16))


@triton.jit
def nvfp4(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """NVFP4."""
    s = j // 16
    code = _byte(data, at + s)
    # The reference ignores the top bit, except that 127 is a zero and 255 is not.
    d = tl.where(code == 127, 0.0, e4m3_half(code & 127))
    return d * _e2m1(_nibble(data, at + 4 + 8 * s, j % 16, 8))


@triton.jit
def _trit(data: tl.tensor, at: tl.tensor, t: tl.tensor) -> tl.tensor:
    """Trit t of a byte, most significant first."""
    power = tl.where(t == 0, 1, tl.where(t == 1, 3, tl.where(t == 2, 9, tl.where(t == 3, 27, 81))))
    return ((_byte(data, at) * power & 255) * 3 >> 8) - 1


@triton.jit
def tq1_0(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """TQ1_0."""
    b = j - 160
    c = j - 240
    place = tl.where(j < 160, j % 32, tl.where(j < 240, 32 + b % 16, 48 + c % 4))
    t = tl.where(j < 160, j // 32, tl.where(j < 240, b // 16, c // 4))
    return _trit(data, at + place, t).to(tl.float32) * _half(data, at + 52)


@triton.jit
def tq2_0(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """TQ2_0."""
    return (_crumb(data, at, j) - 1).to(tl.float32) * _half(data, at + 64)


@triton.jit
def q1_0(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q1_0."""
    d = _half(data, at)
    return tl.where((_byte(data, at + 2 + j // 8) >> (j % 8) & 1) != 0, d, negative(d))


@triton.jit
def q2_0(data: tl.tensor, at: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Q2_0."""
    q = _byte(data, at + 2 + j // 4) >> (j % 4 * 2) & 3
    return (q - 1).to(tl.float32) * _half(data, at)
