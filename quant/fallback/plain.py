"""One-shot block formats in numpy: scales follow from the extremes of a block, nothing to search.

Q8_0, MXFP4, NVFP4, TQ1_0, TQ2_0, Q1_0, Q2_0, and the helpers that every numpy encoder shares.
Source of the algorithms: ggml's reference quantizers (own implementation).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..floats import f16_bits

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

ONE = np.float32(1)


def half_bytes(x: Floats) -> Bytes:
    """Return the little-endian float16 bytes of ``x`` [n] as uint8 [n, 2]."""
    return f16_bits(x).reshape(-1, 1).view(np.uint8)


def as_half(x: Floats) -> Floats:
    """Return ``x`` rounded to float16, as float32."""
    return f16_bits(x).view(np.float16).astype(np.float32)


def inverse(d: Floats) -> Floats:
    """Return 1/d, and 0 where d is 0."""
    return np.where(d != 0, ONE / d, np.float32(0))


def round_away(x: Floats) -> Ints:
    """Round half away from zero, as C's roundf, then convert as x86 does: out of range gives 0."""
    whole = np.trunc(x)
    whole += np.copysign((np.abs(x - whole) >= 0.5).astype(np.float32), x)
    return to_int(whole)


def to_int(x: Floats) -> Ints:
    """Truncate to int32; values that do not fit become 0 (the low byte of x86's answer)."""
    return np.where(np.abs(x) < 2.0**31, x, np.float32(0)).astype(np.int32)


def ordered_sum(x: Floats) -> Floats:
    """Sum over the last axis strictly from the first element, in float32."""
    total = np.zeros(x.shape[:-1], np.float32)
    for i in range(x.shape[-1]):
        total += x[..., i]
    return total


def nibbles(q: Ints) -> Bytes:
    """Pack codes [..., 2n]: byte j holds element j (low) and j + n (high); uint8 [..., n]."""
    half = q.shape[-1] // 2
    return ((q[..., :half] & 15) | ((q[..., half:] & 15) << 4)).astype(np.uint8)


def crumbs(q: Ints) -> Bytes:
    """Pack two-bit codes [blocks, 256] to [blocks, 64]: byte l holds l, l+32, l+64, l+96."""
    parts = (q & 3).reshape(-1, 2, 4, 32)
    packed = parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6
    return packed.reshape(-1, 64).astype(np.uint8)


def encode_q8_0(x: Floats, importance: Floats | None) -> Bytes:
    """Q8_0: d = absmax / 127 in float16, 32 signed bytes."""
    blocks = x.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1) / np.float32(127)
    q = round_away(blocks * inverse(d)[:, None]).astype(np.int8)
    return np.concatenate([half_bytes(d), q.view(np.uint8)], axis=1)


_E2M1_MIDDLES = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10], np.float32)


def e2m1_codes(x: Floats, d: Floats) -> Ints:
    """Nearest doubled E2M1 code of ``x`` [n, k] for scale ``d`` [n], the smaller one on ties."""
    code = np.zeros(x.shape, np.int32)
    magnitude = np.abs(x)
    for middle in _E2M1_MIDDLES:
        code += magnitude > (middle * d)[:, None]
    code[d == 0] = 0
    return code | np.where((x < 0) & (code != 0), 8, 0)


def encode_mxfp4(x: Floats, importance: Floats | None) -> Bytes:
    """MXFP4: a power-of-two scale byte from absmax, then E2M1 nibbles."""
    blocks = x.reshape(-1, 32)
    amax = np.abs(blocks).max(axis=1)
    # In float32, log2 rounds up just below a power of two, as the C library's log2f does.
    floor = np.floor(np.log2(np.where(amax > 0, amax, ONE).astype(np.float64)).astype(np.float32))
    e = np.where(amax > 0, (floor.astype(np.int32) + 125) & 255, 0).astype(np.uint32)
    bits = np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), (e - 1) << 23)
    d = bits.astype(np.uint32).view(np.float32)
    q = e2m1_codes(blocks, d)
    return np.concatenate([e.astype(np.uint8)[:, None], nibbles(q)], axis=1)


def _e4m3(x: Floats) -> Ints:
    x = np.minimum(x, np.float32(448))
    bits = x.view(np.uint32).astype(np.int64)
    exponent = ((bits >> 23) & 255) - 120
    small = np.clip(to_int(x * np.float32(512) + np.float32(0.5)), 0, 7)
    mantissa = ((bits >> 20) & 7) + ((bits >> 19) & 1)
    normal = np.minimum((exponent << 3) + mantissa, 0x7E)
    return np.where(x > 0, np.where(exponent <= 0, small, normal), 0).astype(np.int32)


def encode_nvfp4(x: Floats, importance: Floats | None) -> Bytes:
    """NVFP4: an E4M3 scale (absmax / 6) per 16 elements, then E2M1 nibbles."""
    parts = x.reshape(-1, 16)
    code = _e4m3(np.abs(parts).max(axis=1) / np.float32(6))
    exponent, mantissa = code >> 3, (code & 7).astype(np.float32)
    d = np.where(
        exponent > 0,
        np.ldexp(ONE + mantissa / np.float32(8), exponent - 8),
        np.ldexp(mantissa, -10),
    ).astype(np.float32)
    q = nibbles(e2m1_codes(parts, d))
    return np.concatenate([code.astype(np.uint8).reshape(-1, 4), q.reshape(-1, 32)], axis=1)


def _ternary(x: Floats) -> tuple[Ints, Bytes]:
    blocks = x.reshape(-1, 256)
    amax = np.abs(blocks).max(axis=1)
    return round_away(blocks * inverse(amax)[:, None]) + 1, half_bytes(amax)


def _trits(q: Ints) -> Bytes:
    """Pack [blocks, trits, n] base 3, first trit most significant, as ceil(v * 256 / 243)."""
    value = np.zeros((q.shape[0], q.shape[2]), np.int32)
    for i in range(5):
        value = value * 3 + (q[:, i] if i < q.shape[1] else 0)
    return ((value * 256 + 242) // 243).astype(np.uint8)


def encode_tq1_0(x: Floats, importance: Floats | None) -> Bytes:
    """TQ1_0: five ternary values per byte at strides 32 and 16, then four at stride 4."""
    q, d = _ternary(x)
    n = q.shape[0]
    parts = (
        q[:, :160].reshape(n, 5, 32), q[:, 160:240].reshape(n, 5, 16), q[:, 240:].reshape(n, 4, 4)
    )  # fmt: skip
    return np.concatenate([*(_trits(p) for p in parts), d], axis=1)


def encode_tq2_0(x: Floats, importance: Floats | None) -> Bytes:
    """TQ2_0: four ternary values per byte."""
    q, d = _ternary(x)
    return np.concatenate([crumbs(q), d], axis=1)


def encode_q1_0(x: Floats, importance: Floats | None) -> Bytes:
    """Q1_0: mean magnitude of 128 elements and their signs."""
    blocks = x.reshape(-1, 128)
    d = ordered_sum(np.abs(blocks)) / np.float32(128)
    signs = np.packbits(blocks >= 0, axis=1, bitorder="little")
    return np.concatenate([half_bytes(d), signs], axis=1)


def encode_q2_0(x: Floats, importance: Floats | None) -> Bytes:
    """Q2_0: absmax of 64 elements and codes of -1, 0, 1."""
    blocks = x.reshape(-1, 64)
    amax = np.abs(blocks).max(axis=1)
    factor = inverse(amax)
    q = np.clip(round_away(blocks * factor[:, None]) + 1, 0, 3)
    q[np.isinf(factor)] = 0  # a C conversion of infinity is the lowest integer
    parts = q.reshape(-1, 16, 4)
    packed = parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6
    return np.concatenate([half_bytes(amax), packed.astype(np.uint8)], axis=1)


def _scale_of(blocks: Bytes) -> Floats:
    return blocks[:, :2].copy().view(np.float16).astype(np.float32)


def decode_q1_0(blocks: Bytes) -> Floats:
    """Return float32 [blocks, 128]."""
    d = _scale_of(blocks)
    return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") != 0, d, -d)


def decode_q2_0(blocks: Bytes) -> Floats:
    """Return float32 [blocks, 64]."""
    q = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return (q.reshape(-1, 64).astype(np.float32) - ONE) * _scale_of(blocks)


ENCODERS = {
    "Q8_0": encode_q8_0,
    "MXFP4": encode_mxfp4,
    "NVFP4": encode_nvfp4,
    "TQ1_0": encode_tq1_0,
    "TQ2_0": encode_tq2_0,
    "Q1_0": encode_q1_0,
    "Q2_0": encode_q2_0,
}

DECODERS = {"Q1_0": decode_q1_0, "Q2_0": decode_q2_0}
