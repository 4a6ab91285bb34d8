"""One-shot formats as array programs: Q8_0, MXFP4, NVFP4, TQ1_0, TQ2_0, Q1_0, Q2_0.

Scales follow from the extremes of a block, nothing is searched; see ``search`` for the
conventions. Source of the algorithms: ggml's reference quantizers (own implementation); the fast
form is ``native/tiny.hpp``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .pack import assemble, columns, crumbs, half, lookup, nibbles, round_away, safe_inverse, to_int
from .search import Array, backend, clip, divided, flag, peak, real, total

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def encode_q8_0(rows: Array, importance: Array | None) -> Array:
    """Q8_0: d = absmax / 127 in float16, 32 signed bytes."""
    x = columns(rows, 32)
    d = divided(peak(x)[0], 127)
    d_bytes, _ = half(d)
    return assemble([d_bytes, round_away(x * safe_inverse(d))], rows.shape[0])


_E2M1_MIDDLES = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)


def e2m1_codes(x: Array, d: Array) -> Array:
    """Nearest doubled E2M1 code of ``x`` [n, blocks] for scale ``d``, the smaller one on ties."""
    xp = backend(x)
    magnitude = xp.abs(x)
    code = xp.zeros_like(x, dtype=xp.int32)
    for middle in _E2M1_MIDDLES:
        code = code + flag(magnitude > d * middle)
    code = xp.where(d == 0, xp.zeros_like(code), code)
    return code + 8 * flag((x < 0) & (code != 0))


def mx_exponent(amax: Array) -> Array:
    """The scale byte of MXFP4: floor(log2(amax)) - 2 + 127, 0 for an empty block."""
    xp = backend(amax)
    some = amax > 0
    safe = xp.where(some, amax, xp.ones_like(amax))
    # In float32, log2 rounds up just below a power of two, as the C library's log2f does.
    if isinstance(safe, np.ndarray):
        log = np.log2(safe.astype(np.float64)).astype(np.float32)
    else:
        log = safe.double().log2().float()
    e = to_int(xp.floor(log))
    return xp.where(some, (e + 125) & 255, xp.zeros_like(e))


def mx_half(e: Array) -> Array:
    """Half of 2**(e - 127), for codes in doubled units."""
    xp = backend(e)
    return xp.where(e < 2, 0x00200000 * (1 + clip(e, 0, 1)), (clip(e, 1, 254) - 1) << 23).view(
        xp.float32
    )


def encode_mxfp4(rows: Array, importance: Array | None) -> Array:
    """MXFP4: a power-of-two scale byte from absmax, then E2M1 nibbles."""
    x = columns(rows, 32)
    return put_mxfp4(x, mx_exponent(peak(x)[0]), rows.shape[0])


def put_mxfp4(x: Array, e: Array, rows: int) -> Array:
    """Encode [32, blocks] under scale bytes ``e``."""
    return assemble([e[None], nibbles(e2m1_codes(x, mx_half(e)))], rows)


def _e4m3_values() -> Floats:
    code = np.arange(128)
    exponent, mantissa = code >> 3, (code & 7).astype(np.float32)
    values = np.where(
        exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 8), np.ldexp(mantissa, -10)
    )
    values[127] = 0
    return values.astype(np.float32)


E4M3 = _e4m3_values()
"""Half the value of each unsigned E4M3 code."""


def e4m3_codes(x: Array) -> Array:
    """Unsigned E4M3 codes of non-negative numbers, half up; 248 and above become 448 as in ggml."""
    xp = backend(x)
    x = xp.where(x > 448, xp.zeros_like(x) + 448, x)
    bits = x.view(xp.int32)
    exponent = ((bits >> 23) & 255) - 120
    small = clip(to_int(x * 512 + 0.5), 0, 7)
    normal = (exponent << 3) + ((bits >> 20) & 7) + ((bits >> 19) & 1)
    normal = xp.where(normal >= 15 << 3, xp.zeros_like(normal) + 0x7E, normal)
    code = xp.where(exponent <= 0, small, normal)
    return xp.where(x > 0, code, xp.zeros_like(code))


def encode_nvfp4(rows: Array, importance: Array | None) -> Array:
    """NVFP4: an E4M3 scale (absmax / 6) per 16 elements, then E2M1 nibbles."""
    x = columns(rows, 16)
    return put_nvfp4(x, e4m3_codes(divided(peak(x)[0], 6)), rows.shape[0])


def put_nvfp4(x: Array, code: Array, rows: int) -> Array:
    """Encode [16, 4 * blocks] under scale codes."""
    packed = nibbles(e2m1_codes(x, lookup(E4M3, code)), 16)
    packed = backend(x).moveaxis(packed.reshape(8, -1, 4), 2, 0).reshape(32, -1)
    return assemble([code.reshape(-1, 4).T, packed], rows)


def _ternary(rows: Array) -> tuple[Array, Array]:
    x = columns(rows, 256)
    amax, _ = peak(x)
    return round_away(x * safe_inverse(amax)) + 1, half(amax)[0]


def _trits(q: Array) -> Array:
    """Pack [trits, n, blocks] base 3, first trit most significant, as ceil(v * 256 / 243)."""
    value = q[0] * 0
    for i in range(5):
        value = value * 3 + (q[i] if i < q.shape[0] else 0)
    return (value * 256 + 242) // 243


def put_tq1_0(q: Array, d_bytes: Array, rows: int) -> Array:
    """Pack levels 0..2: five per byte at strides 32 and 16, then four at stride 4."""
    n = q.shape[1]
    parts = (q[:160].reshape(5, 32, n), q[160:240].reshape(5, 16, n), q[240:].reshape(4, 4, n))
    return assemble([*(_trits(p) for p in parts), d_bytes], rows)


def encode_tq1_0(rows: Array, importance: Array | None) -> Array:
    """TQ1_0: base-3 packed ternary values and their absmax."""
    q, d_bytes = _ternary(rows)
    return put_tq1_0(q, d_bytes, rows.shape[0])


def encode_tq2_0(rows: Array, importance: Array | None) -> Array:
    """TQ2_0: four ternary values per byte."""
    q, d_bytes = _ternary(rows)
    return assemble([crumbs(q), d_bytes], rows.shape[0])


def put_q1_0(x: Array, d: Array, rows: int) -> Array:
    """The scale and the signs of [128, blocks]."""
    signs = flag(x >= 0).reshape(16, 8, -1)
    packed = signs[:, 0]
    for k in range(1, 8):
        packed = packed | signs[:, k] << k
    return assemble([half(d)[0], packed], rows)


def encode_q1_0(rows: Array, importance: Array | None) -> Array:
    """Q1_0: mean magnitude of 128 elements and their signs."""
    x = columns(rows, 128)
    return put_q1_0(x, divided(total(backend(x).abs(x)), 128), rows.shape[0])


def put_q2_0(q: Array, d_bytes: Array, rows: int) -> Array:
    """Four consecutive codes 0..3 per byte."""
    parts = q.reshape(16, 4, -1)
    packed = parts[:, 0] | parts[:, 1] << 2 | parts[:, 2] << 4 | parts[:, 3] << 6
    return assemble([d_bytes, packed], rows)


def encode_q2_0(rows: Array, importance: Array | None) -> Array:
    """Q2_0: absmax of 64 elements and codes of -1, 0, 1."""
    x = columns(rows, 64)
    xp = backend(x)
    amax, _ = peak(x)
    factor = safe_inverse(amax)
    q = clip(round_away(x * factor) + 1, 0, 3)
    q = xp.where(xp.isinf(factor), xp.zeros_like(q), q)  # C turns infinity into the lowest integer
    return put_q2_0(q, half(amax)[0], rows.shape[0])


def _scale_of(blocks: Bytes) -> Floats:
    return blocks[:, :2].copy().view(np.float16).astype(np.float32)


def decode_q1_0(blocks: Bytes) -> Floats:
    """Return float32 [blocks, 128]."""
    d = _scale_of(blocks)
    return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") != 0, d, -d)


def decode_q2_0(blocks: Bytes) -> Floats:
    """Return float32 [blocks, 64]."""
    q = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return (real(q.reshape(-1, 64)) - 1) * _scale_of(blocks)


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
