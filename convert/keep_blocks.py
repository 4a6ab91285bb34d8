"""Quantized weights as ggml blocks of the same numbers, where a block type holds them exactly.

A block of Q4_0, Q5_0 or Q8_0 is ``d * (code - 8, 16 or 0)``, of Q4_1 ``d * code + m``, with d and
m in half precision. Integers whose scales are exact in f16, in groups of whole blocks of 32
columns, are such blocks; so are ternary ones in TQ2_0, whose one scale becomes a tensor of its
own. MXFP4 and NVFP4 are ggml's, but for the order of their bytes. Source: ggml's block structures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FormatError
from ..quant import GgmlType, type_by_name
from ..shardio.box import Box
from ..shardio.dequant import Floats, Integers
from ..shardio.tensor import LazyTensor
from .gguf.tensors import BlockTensor
from .mxfp4 import pack_mxfp4, pack_nvfp4

_BLOCK = 32
_BATCH = 1 << 19  # elements packed at once
_RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
_F16_MAX = np.float32(65504)


@dataclass(frozen=True, slots=True)
class Fit:
    """Which types hold a weight exactly, the smallest first; else why none does."""

    types: tuple[str, ...]
    reason: str = ""


def fitting(codes: Integers | Floats) -> Fit:
    """Find the block types of a weight; reads its scales and zeros, a piece at a time."""
    columns = codes.packed.shape[1] * 2 if isinstance(codes, Floats) else codes.exact.shape[1]
    if isinstance(codes, Floats):
        size = type_by_name(codes.kind).block
        return _refused(columns, size) if columns % size else Fit((codes.kind,))
    if _is_ternary(codes) and columns % 256 == 0:
        return Fit(("TQ2_0",))
    group = codes.block[1]
    if columns % _BLOCK:
        return _refused(columns, _BLOCK)
    if group % _BLOCK and group < columns:
        return Fit((), f"groups of {group} columns are no whole blocks of {_BLOCK}")
    if codes.order is not None:
        given = codes.order.read()
        if not np.array_equal(given, np.arange(columns) // group):
            return Fit((), "its inputs are in a learned order (g_idx, act-order)")
    return _by_values(codes)


def _refused(columns: int, size: int) -> Fit:
    return Fit((), f"rows of {columns} do not fill blocks of {size}")


def _is_ternary(codes: Integers) -> bool:
    return (codes.low, codes.high) == (-1, 1) and codes.scale.size == 1


def _by_values(codes: Integers) -> Fit:
    """Look at scales and zeros, as many rows at a time as make a batch."""
    least, most, shifted = 0, 0, codes.high - codes.low < 16
    for top, bottom in _batches(codes.scale.shape):
        cut = [slice(top, bottom)]
        raw = codes.scale.read(cut)
        if not _half_exact(raw):
            return Fit((), f"its scales ({codes.scale.dtype.name}) are not exact in f16")
        if codes.zero is None:
            continue
        zero = codes.zero.read(cut).astype(np.float32)
        if not np.array_equal(np.rint(zero), zero):
            return Fit((), "its zeros are no whole numbers")
        first = top == 0
        least = int(zero.min()) if first else min(least, int(zero.min()))
        most = int(zero.max()) if first else max(most, int(zero.max()))
        shifted = shifted and bool((raw > 0).all())
        shifted = shifted and _half_exact((codes.low - zero) * raw.astype(np.float32))
    low, high = codes.low - most, codes.high - least
    types = [t for t, (a, b) in _RANGES.items() if a <= low and high <= b]
    if shifted and codes.zero is not None and "Q4_0" not in types:
        types.insert(0, "Q4_1")
    return Fit(tuple(types), "" if types else f"its values, {low} to {high} steps, need 9 bits")


def _batches(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    step = max(1, _BATCH // max(1, shape[1]))
    return ((at, min(at + step, shape[0])) for at in range(0, shape[0], step))


def _half_exact(values: np.ndarray) -> bool:
    """Whether float16 has all values (which are float32 or less)."""
    if values.dtype == np.float16:
        return bool(np.isfinite(values).all())
    wide = values.astype(np.float32)
    if not (np.abs(wide) <= _F16_MAX).all():
        return False
    return bool(np.array_equal(wide.astype(np.float16).astype(np.float32), wide))


def blocks_as(codes: Integers | Floats, kind: str, name: str) -> BlockTensor:
    """Return a weight as rows of blocks of a type that holds it (see ``fitting``)."""
    if isinstance(codes, Floats):
        if kind == "NVFP4":
            return pack_nvfp4(codes.packed, codes.scale, name)
        rows, groups = codes.scale.shape
        return pack_mxfp4(codes.packed.reshape((rows, groups, 16)), codes.scale)
    ggml = type_by_name(kind)
    return BlockTensor(_Packed(codes, ggml, name), ggml)


def factor_of(codes: Integers | Floats, kind: str) -> LazyTensor | None:
    """Return what a runtime multiplies the product with, float32 of one element; None: nothing."""
    if isinstance(codes, Floats):
        return codes.factor
    return codes.scale.reshape((1,)).cast(np.dtype(np.float32)) if kind == "TQ2_0" else None


class _Packed(LazyTensor):
    """uint8 [rows, row bytes] of blocks, packed when they are read."""

    __slots__ = ("_codes", "_kind", "_name")

    def __init__(self, codes: Integers, kind: GgmlType, name: str) -> None:
        rows, columns = codes.exact.shape
        super().__init__((rows, kind.row_bytes(columns)), np.dtype(np.uint8))
        self._codes = codes
        self._kind = kind
        self._name = name

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Pack the blocks that a region touches, a batch of rows at a time."""
        (top, low), (bottom, high) = box
        size = self._kind.bytes
        first, last = low // size, -(-high // size)
        step = max(1, _BATCH // max(1, (last - first) * self._kind.block))
        for at in range(top, bottom, step):
            end = min(at + step, bottom)
            data = self._blocks(at, end, first, last)
            out[at - top : end - top] = data[:, low - first * size : high - first * size]

    def _blocks(self, top: int, bottom: int, first: int, last: int) -> np.ndarray:
        codes, width = self._codes, self._kind.block
        cut = [slice(top, bottom), slice(first * width, last * width)]
        value = codes.exact.read(cut).reshape(bottom - top, last - first, width)
        scale = self._spread(codes.scale, top, bottom, first, last)
        step = np.where(scale == 0, np.float32(1), scale)[..., None]
        whole = value / step
        if not scale.all():  # products are zeros then, and a code may choose their sign
            negative = np.signbit(value) ^ np.signbit(scale)[..., None]
            whole = np.where(scale[..., None] == 0, -negative.astype(np.float32), whole)
        if not np.array_equal(np.rint(whole), whole) or not np.isfinite(scale).all():
            raise FormatError(f"{self._name}: its scales are damaged (infinity or NaN)")
        if self._kind.name == "TQ2_0":
            return _tq2_0(whole).reshape(bottom - top, -1)
        low = np.zeros_like(scale)
        if self._kind.name == "Q4_1":
            assert codes.zero is not None
            low = codes.low - self._spread(codes.zero, top, bottom, first, last)
        packed = _PACKERS[self._kind.name](whole, scale, low)
        return packed.reshape(bottom - top, -1)

    def _spread(self, part: LazyTensor, top: int, bottom: int, first: int, last: int) -> np.ndarray:
        """What belongs to each block: float32 [rows, blocks]."""
        (tall, wide), width = self._codes.block, self._kind.block
        rows = np.arange(top, bottom) // tall
        columns = np.arange(first, last) * width // wide
        cut = [slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)]
        held = part.read(cut).astype(np.float32)
        return held[np.ix_(rows - rows[0], columns - columns[0])]

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The file pieces of codes and scales."""
        return self._codes.exact.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The leaves of codes and scales."""
        return self._codes.exact.leaves()


def _half(values: np.ndarray) -> np.ndarray:
    """Return float16 bytes [..., 2]."""
    return values.astype("<f2")[..., None].view(np.uint8)


def _nibbles(code: np.ndarray) -> np.ndarray:
    return code[..., :16] | code[..., 16:] << 4


def _q4_0(whole: np.ndarray, scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    code = (whole + 8).astype(np.uint8)
    return np.concatenate([_half(scale), _nibbles(code)], -1)


def _q4_1(whole: np.ndarray, scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    code = (whole - low[..., None]).astype(np.uint8)
    return np.concatenate([_half(scale), _half(low * scale), _nibbles(code)], -1)


def _q5_0(whole: np.ndarray, scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    code = (whole + 16).astype(np.uint8)
    high = np.packbits(code >> 4, axis=-1, bitorder="little")
    return np.concatenate([_half(scale), high, _nibbles(code & 15)], -1)


def _q8_0(whole: np.ndarray, scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    return np.concatenate([_half(scale), whole.astype(np.int8).view(np.uint8)], -1)


_PACKERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q8_0": _q8_0,
}  # fmt: skip


def _tq2_0(whole: np.ndarray) -> np.ndarray:
    """[rows, blocks, 256] of -1, 0, 1: byte l of each half holds elements l, l + 32, ..."""
    code = (whole + 1).astype(np.uint8).reshape(*whole.shape[:-1], 2, 4, 32)
    data = code[..., 0, :] | code[..., 1, :] << 2 | code[..., 2, :] << 4 | code[..., 3, :] << 6
    data = data.reshape(*whole.shape[:-1], 64)
    return np.concatenate([data, _half(np.ones(whole.shape[:-1], np.float32))], -1)
