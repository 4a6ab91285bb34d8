"""Byte packing shared by the array encoders: codes are int32 [elements, blocks], bytes [n, blocks].

Everything works on numpy arrays and torch tensors alike; ``assemble`` turns byte rows into the
encoded rows of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..floats import f16_bits
from .search import Array, backend, over, real, root


def columns(x: Array, block: int) -> Array:
    """View rows [rows, cols] as [block, blocks], contiguous along blocks."""
    flat = x.reshape(-1, block).T
    return np.ascontiguousarray(flat) if isinstance(flat, np.ndarray) else flat.contiguous()


def spread(importance: Array, rows: int, block: int) -> Array:
    """Repeat importance [cols] for every row and view it as ``columns`` does."""
    part = importance.reshape(-1, block).T
    return backend(importance).concatenate([part] * rows, 1)


def error_weights(x: Array, importance: Array, mean: Array, *, pure: bool = False) -> Array:
    """importance * sqrt(mean + x*x), or ``importance`` alone if it is the error weight itself."""
    return importance if pure else importance * root(mean + x * x)


def half(d: Array) -> tuple[Array, Array]:
    """Round [blocks] to float16; returns its bytes [2, blocks] (as int32) and the rounded value."""
    if isinstance(d, np.ndarray):
        bits = f16_bits(d)
        rounded = bits.view(np.float16).astype(np.float32)
        codes = bits.astype(np.int32)
    else:
        import torch

        narrow = d.to(torch.float16)
        rounded = narrow.float()
        codes = narrow.view(torch.int16).to(torch.int32) & 0xFFFF
    return backend(d).stack([codes & 255, codes >> 8]), rounded


def safe_inverse(d: Array) -> Array:
    """1/d, and 0 where d is 0."""
    xp = backend(d)
    return xp.where(d != 0, over(1, d), xp.zeros_like(d))


def to_int(x: Array) -> Array:
    """Truncate to int32; what does not fit gives 0 (the low byte of x86's answer)."""
    xp = backend(x)
    safe = xp.where(xp.abs(x) < 2.0**31, x, xp.zeros_like(x))
    return safe.astype(np.int32) if isinstance(safe, np.ndarray) else safe.to(xp.int32)


def round_away(x: Array) -> Array:
    """Round half away from zero, as C's roundf, then convert as ``to_int`` does."""
    xp = backend(x)
    whole = xp.trunc(x)
    return to_int(whole + xp.copysign(real(xp.abs(x - whole) >= 0.5), x))


def lookup(table: np.ndarray, index: Array) -> Array:
    """Entries of a small numpy table at integer places, on the device of ``index``."""
    if isinstance(index, np.ndarray):
        return table[index]
    import torch

    return torch.from_numpy(table).to(index.device)[index.long()]


def nibbles(q: Array, group: int = 32) -> Array:
    """Byte j of each group holds element j (low) and j + group/2 (high)."""
    parts = (q & 15).reshape(-1, 2, group // 2, q.shape[-1])
    return (parts[:, 0] | parts[:, 1] << 4).reshape(-1, q.shape[-1])


def crumbs(q: Array) -> Array:
    """Two-bit codes [256, blocks]: byte l of each 128 holds l, l+32, l+64, l+96; [64, blocks]."""
    p = (q & 3).reshape(2, 4, 32, q.shape[-1])
    return (p[:, 0] | p[:, 1] << 2 | p[:, 2] << 4 | p[:, 3] << 6).reshape(64, q.shape[-1])


def planes(bit: Array) -> Array:
    """Bits [256, blocks]: bit k of byte m belongs to element 32k + m; [32, blocks]."""
    parts = bit.reshape(8, 32, bit.shape[-1])
    result = parts[0]
    for k in range(1, 8):
        result = result | parts[k] << k
    return result


def fifth_bits(q: Array) -> Array:
    """The high bit of 32 five-bit codes: bit j of four bytes belongs to element j; [4, blocks]."""
    bits = (q >> 4 & 1).reshape(4, 8, q.shape[-1])
    result = bits[:, 0]
    for k in range(1, 8):
        result = result | bits[:, k] << k
    return result


def assemble(parts: Sequence[Array], rows: int) -> Array:
    """Stack byte rows [n, blocks] and return uint8 [rows, row bytes]."""
    xp = backend(parts[0])
    stacked = (xp.concatenate(list(parts)) & 255).T
    if isinstance(stacked, np.ndarray):
        return np.ascontiguousarray(stacked.astype(np.uint8)).reshape(rows, -1)
    return stacked.to(xp.uint8).contiguous().reshape(rows, -1)


def larger(values: Array) -> Array:
    """Running maximum from zero over [n, blocks], keeping the sign of zero as C's ``>`` does."""
    xp = backend(values)
    most = xp.zeros_like(values[0])
    for row in values:
        most = xp.where(row > most, row, most)
    return most


def scaled(codes: Array, d: Array) -> Array:
    """d * code for integer codes [n, blocks]."""
    return d * real(codes)


def repeated(x: Array, times: int) -> Array:
    """Repeat each entry of [n] in place; [n * times]."""
    return np.repeat(x, times) if isinstance(x, np.ndarray) else x.repeat_interleave(times)
