"""Integers packed into 32-bit words with scales and zeros per group: GPTQ, AWQ, compressed-tensors.

GPTQ packs along the inputs, values in one little-endian stream of bits (so that 3 bits straddle
words), stores zeros minus one (format ``gptq``; not ``gptq_v2``), and may order inputs by
``g_idx``. AWQ packs along the outputs in the order 0 2 4 6 1 3 5 7. Sources: AutoGPTQ
``nn_modules/qlinear``, AutoAWQ ``utils/packing_utils.py``, compressed-tensors
``compressors/quantized_compressors/pack_quantized.py``.
"""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from ..tensor import LazyTensor
from .coded import Coded, Integers
from .node import F32, Decoded, region, rows_of
from .scaled import scaled

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in the word each of 8 neighbours lies


def unstream(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the values of a stream of ``bits`` along dim 0: [words, n] -> [values, n]."""
    wide = words.view(np.uint32) if words.dtype.itemsize == 4 else words.astype(np.uint32)
    period = wide.reshape((-1, bits, *wide.shape[1:]))  # 32 values are `bits` words
    out = np.empty((period.shape[0], 32, *wide.shape[1:]), np.uint8)
    for k in range(32):
        word, shift = divmod(k * bits, 32)
        value = period[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            value = value | (period[:, word + 1] << np.uint32(32 - shift))
        out[:, k] = value & np.uint32((1 << bits) - 1)
    return out.reshape((-1, *wide.shape[1:]))


class _Zeros(Decoded):
    """Zeros [groups, outputs], packed along the outputs: a stream of bits, or AWQ's order."""

    __slots__ = ("_bits", "_shift")

    def __init__(self, qzeros: LazyTensor, bits: int, shift: int, *, awq: bool = False) -> None:
        shape = (qzeros.shape[0], qzeros.shape[1] * 32 // bits)
        super().__init__(shape, F32, (qzeros,), unit=(1, 8 if awq else 32))
        self._bits, self._shift = 0 if awq else bits, shift

    def decode(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Decode a region."""
        bits = self._bits or 4
        packed = region(self._parts[0], top, bottom, left * bits // 32, right * bits // 32)
        if not self._bits:
            return _unawq(packed).astype(F32)
        return unstream(packed.T.copy(), bits).T.astype(F32) + self._shift


class Gptq(Decoded):
    """[inputs, outputs]; transposed by the caller."""

    __slots__ = ("_bits", "_group", "_shift")

    def __init__(
        self, parts: tuple[LazyTensor, ...], dtype: np.dtype, bits: int, group: int, shift: int
    ) -> None:
        qweight, scales = parts[0], parts[2]
        super().__init__(
            (qweight.shape[0] * 32 // bits, scales.shape[1]), dtype, parts, unit=(32, 32)
        )
        self._bits, self._group, self._shift = bits, group, shift

    def decode(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Decode a region. Raises FormatError for a ``g_idx`` that names no group."""
        qweight, qzeros, scales, *order = self._parts
        b = self._bits
        value = unstream(region(qweight, top * b // 32, bottom * b // 32, left, right), b)
        groups = rows_of(order[0], top, bottom) if order else np.arange(top, bottom) // self._group
        if order and not 0 <= groups.min() <= groups.max() < scales.shape[0]:
            raise FormatError(
                f"{next(order[0].spans())[0]}: g_idx names group {groups.max()} or {groups.min()} "
                f"of {scales.shape[0]} groups: the file is damaged"
            )
        packed = region(qzeros, 0, qzeros.shape[0], left * b // 32, right * b // 32)
        zeros = unstream(packed.T.copy(), b).T.astype(F32) + self._shift
        scale = region(scales, 0, scales.shape[0], left, right).astype(F32)
        return (value.astype(F32) - zeros[groups]) * scale[groups]


def gptq(
    name: str, parts: dict[str, LazyTensor], dtype: np.dtype, bits: int, group: int, *, v2: bool
) -> LazyTensor:
    """Return the weight [outputs, inputs] of ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

    Raises:
        FormatError: shapes that do not fit.
    """
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    order = parts.get("g_idx")
    if bits not in (2, 3, 4, 8) or any(t.ndim != 2 for t in (qweight, qzeros, scales)):
        raise FormatError(f"{name}: GPTQ with {bits} bits and {qweight.ndim}-d words")
    inputs, outputs = qweight.shape[0] * 32 // bits, scales.shape[1]
    group = group if group > 0 else inputs
    groups = scales.shape[0]
    fits = (
        qweight.shape[0] % bits == 0
        and qweight.shape[1] == outputs
        and outputs % 32 == 0
        and qzeros.shape == (groups, outputs * bits // 32)
        and (order is None or order.shape == (inputs,))
        and -(-inputs // group) == groups
    )
    if not fits:
        raise FormatError(
            f"{name}: {bits} bits in groups of {group}: qweight {list(qweight.shape)}, qzeros "
            f"{list(qzeros.shape)}, scales {list(scales.shape)} do not fit each other"
        )
    held = (qweight, qzeros, scales) if order is None else (qweight, qzeros, scales, order)
    shift = 0 if v2 else 1
    exact, values = (Gptq(held, d, bits, group, shift).permute((1, 0)) for d in (F32, dtype))
    zero = _Zeros(qzeros, bits, shift).permute((1, 0))
    scale = scales.permute((1, 0))
    high = (1 << bits) - 1
    return Coded(values, Integers(exact, scale, (1, group), 0, high, zero, order))


class Awq(Decoded):
    """[inputs, outputs]; transposed by the caller."""

    __slots__ = ("_group",)

    def __init__(self, parts: tuple[LazyTensor, ...], dtype: np.dtype, group: int) -> None:
        super().__init__((parts[0].shape[0], parts[2].shape[1]), dtype, parts, unit=(1, 8))
        self._group = group

    def decode(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Decode a region."""
        qweight, qzeros, scales = self._parts
        first, last = top // self._group, -(-bottom // self._group)
        groups = np.arange(top, bottom) // self._group - first
        value = _unawq(region(qweight, top, bottom, left // 8, right // 8)).astype(F32)
        zeros = _unawq(region(qzeros, first, last, left // 8, right // 8)).astype(F32)
        scale = region(scales, first, last, left, right).astype(F32)
        return (value - zeros[groups]) * scale[groups]


def _unawq(words: np.ndarray) -> np.ndarray:
    wide = words.view(np.uint32)
    out = np.empty((*wide.shape, 8), np.uint8)
    for k, place in enumerate(_AWQ_ORDER):
        out[..., k] = (wide >> np.uint32(4 * place)) & np.uint32(15)
    return out.reshape(wide.shape[0], -1)


def awq(name: str, parts: dict[str, LazyTensor], dtype: np.dtype, group: int) -> LazyTensor:
    """Return the weight [outputs, inputs] of ``qweight``, ``qzeros`` and ``scales`` (4 bits).

    Raises:
        FormatError: shapes that do not fit.
    """
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    inputs, outputs = qweight.shape[0], qweight.shape[-1] * 8
    group = group if group > 0 else inputs
    groups = -(-inputs // group)
    if scales.shape != (groups, outputs) or qzeros.shape != (groups, outputs // 8):
        raise FormatError(
            f"{name}: AWQ in groups of {group}: qweight {list(qweight.shape)}, qzeros "
            f"{list(qzeros.shape)}, scales {list(scales.shape)} do not fit each other"
        )
    held = (qweight, qzeros, scales)
    exact, values = (Awq(held, d, group).permute((1, 0)) for d in (F32, dtype))
    zero = _Zeros(qzeros, 4, 0, awq=True).permute((1, 0))
    return Coded(values, Integers(exact, scales.permute((1, 0)), (1, group), 0, 15, zero))


class _Words(Decoded):
    """Values of ``bits`` in 32-bit words along ``axis``, low bits first, minus an offset."""

    __slots__ = ("_axis", "_bits", "_offset")

    def __init__(self, words: LazyTensor, shape: tuple[int, int], bits: int, axis: int) -> None:
        per = 32 // bits
        super().__init__(shape, F32, (words,), unit=(per, 1) if axis == 0 else (1, per))
        self._axis, self._bits, self._offset = axis, bits, 1 << (bits - 1)

    def decode(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Decode a region."""
        per = 32 // self._bits
        if self._axis == 0:
            words = region(self._parts[0], top // per, -(-bottom // per), left, right).T
        else:
            words = region(self._parts[0], top, bottom, left // per, -(-right // per))
        wide = np.ascontiguousarray(words).view(np.uint32)
        shifts = (np.arange(per) * self._bits).astype(np.uint32)
        mask = np.uint32((1 << self._bits) - 1)
        value = ((wide[..., None] >> shifts) & mask).reshape(wide.shape[0], -1).astype(F32)
        value -= self._offset
        whole = value.T if self._axis == 0 else value
        return whole[: bottom - top, : right - left]


def pack_quantized(
    name: str, parts: dict[str, LazyTensor], dtype: np.dtype, bits: int
) -> LazyTensor:
    """Return the weight of compressed-tensors' ``weight_packed``, ``weight_scale``...

    Raises:
        FormatError: shapes that do not fit, inputs in a learned order.
    """
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    if "weight_g_idx" in parts and (parts["weight_g_idx"].read() >= 0).any():
        raise FormatError(f"{name}: inputs in a learned order (weight_g_idx) are not read")
    if bits not in (4, 8) or packed.ndim != 2:
        raise FormatError(f"{name}: {bits} bits in {packed.ndim}-d words")
    per = 32 // bits
    shape = (packed.shape[0], packed.shape[1] * per)
    if "weight_shape" in parts:
        rows, columns = (int(n) for n in parts["weight_shape"].read().reshape(-1))
        if rows != shape[0] or not shape[1] - per < columns <= shape[1]:
            raise FormatError(f"{name}: weight_shape {[rows, columns]}, packed {list(shape)}")
        shape = (rows, columns)
    zero = parts.get("weight_zero_point")
    if zero is not None and zero.shape != scale.shape:
        zero = _Words(zero, (scale.shape[0], scale.shape[1]), bits, axis=0)
    half = 1 << (bits - 1)
    words = _Words(packed, shape, bits, axis=1)
    return scaled(name, words, scale, dtype, zero=zero, levels=(-half, half - 1))
