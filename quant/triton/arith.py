"""Float and integer steps that every Triton kernel here is made of, each rounded as ggml rounds it.

Division and square root are the IEEE ones (plain ``/`` is an approximation in Triton), nothing is
reduced in an order of the compiler's choice, and integers out of a float's range are never left to
the hardware: NaN has other bits on a GPU than on a processor, so it is replaced before its bits
are used. The meaning of each step is that of the function of the same name in ``..fallback``.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-15)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even
_MAGIC_BITS = tl.constexpr(0x4B000000)
_ZERO_BITS = tl.constexpr(0x00400000)  # mantissa of _MAGIC, the level 0


@triton.jit
def over(top: tl.tensor, x: tl.tensor) -> tl.tensor:
    """top / x, rounded once; ``top`` is a number or a tensor."""
    return tl.div_rn(tl.zeros_like(x) + top, x)


@triton.jit
def safe_inverse(d: tl.tensor) -> tl.tensor:
    """1 / d, and 0 where d is 0."""
    return tl.where(d != 0, over(1.0, d), 0.0)


@triton.jit
def negative(x: tl.tensor) -> tl.tensor:
    """-x with the sign of zero flipped (Triton's minus is 0 - x)."""
    return x * -1.0


@triton.jit
def bits(x: tl.tensor) -> tl.tensor:
    """The bits of a float32 as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(i: tl.tensor) -> tl.tensor:
    """The float32 with these bits."""
    return i.to(tl.float32, bitcast=True)


@triton.jit
def nearest(x: tl.tensor) -> tl.tensor:
    """Round half to even, as int32; beyond 2**22 it wraps as in the reference, NaN gives 0."""
    x = tl.where(x == x, x, 0.0)
    return (bits(x + _MAGIC) & 0x007FFFFF) - _ZERO_BITS


@triton.jit
def level(x: tl.tensor, low: tl.constexpr, high: tl.constexpr) -> tl.tensor:
    """``nearest`` of numbers (no NaN) clamped to low .. high, as float32, in six fast steps."""
    code = bits(x + _MAGIC) & 0x007FFFFF
    code = tl.minimum(tl.maximum(code, _ZERO_BITS + low), _ZERO_BITS + high)
    return from_bits(code | _MAGIC_BITS) - _MAGIC


@triton.jit
def clip(q: tl.tensor, low: tl.constexpr, high: tl.constexpr) -> tl.tensor:
    """Clamp integers."""
    return tl.minimum(tl.maximum(q, low), high)


@triton.jit
def finite_or_zero(x: tl.tensor) -> tl.tensor:
    """Replace infinity and NaN by 0."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def to_int(x: tl.tensor) -> tl.tensor:
    """Truncate to int32; what does not fit gives 0 (the low byte of x86's answer)."""
    return tl.where(tl.abs(x) < 2147483648.0, x, 0.0).to(tl.int32)


@triton.jit
def to_int8(x: tl.tensor) -> tl.tensor:
    """C's float to int8 conversion on x86: truncate, low byte, sign; as int32."""
    return ((to_int(x) + 128) & 255) - 128


@triton.jit
def round_away(x: tl.tensor) -> tl.tensor:
    """Round half away from zero, as C's roundf, then convert as ``to_int`` does."""
    a = tl.abs(x)
    fits = a < 2147483648.0
    q = tl.where(fits, a, 0.0).to(tl.int32)
    q += tl.where(fits & (a - q.to(tl.float32) >= 0.5), 1, 0)
    return tl.where(x < 0, -q, q)


@triton.jit
def half(d: tl.tensor) -> tl.tensor:
    """Round to float16: its bits (int32) and the rounded value (float32)."""
    narrow = d.to(tl.float16)
    return narrow.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, narrow.to(tl.float32)


@triton.jit
def total(values: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """Sum of a tuple in order."""
    result = tl.zeros_like(values[0])
    for e in tl.static_range(N):
        result += values[e]
    return result


@triton.jit
def sum_squares(x: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """Sum of squares of a tuple in order."""
    result = tl.zeros_like(x[0])
    for e in tl.static_range(N):
        result += x[e] * x[e]
    return result


@triton.jit
def squares(x: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """The squares of a tuple."""
    w: tl.tuple = ()
    for e in tl.static_range(N):
        w = w + (x[e] * x[e],)
    return w


@triton.jit
def error_weights(
    x: tl.tensor, importance: tl.tensor, mean: tl.tensor, N: tl.constexpr, PURE: tl.constexpr
) -> tl.tensor:
    """importance * sqrt(mean + x*x), or ``importance`` itself if ``PURE``."""
    w: tl.tuple = ()
    for e in tl.static_range(N):
        w = w + (importance[e] if PURE else importance[e] * tl.sqrt_rn(mean + x[e] * x[e]),)
    return w
