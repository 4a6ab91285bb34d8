"""Four-bit floats (E2M1), two in a byte, the low half first: MXFP4 and NVFP4.

MXFP4 (gpt-oss): 32 values share a power of two, stored with bias 127. NVFP4: 16 values share an
FP8 scale, and the tensor a float32 one. Sources: OCP Microscaling Formats 1.0, transformers
``integrations/mxfp4.py``, compressed-tensors ``nvfp4_quantized.py``, TensorRT Model Optimizer.
"""

from __future__ import annotations

import numpy as np

from ...errors import FormatError
from ..tensor import LazyTensor
from .coded import Coded, Floats
from .node import F32, Decoded, region, rows_of

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_PAIRS = np.stack(np.meshgrid(np.r_[E2M1, -E2M1], np.r_[E2M1, -E2M1]), axis=-1).reshape(256, 2)


def unpack(data: np.ndarray) -> np.ndarray:
    """Return the values of packed bytes: [..., n] -> [..., 2n]."""
    return _PAIRS[data].reshape((*data.shape[:-1], -1))


class Mxfp4(Decoded):
    """[rows, columns] of blocks [rows, groups, 16] and scales [rows, groups]."""

    __slots__ = ()

    def __init__(self, blocks: LazyTensor, scales: LazyTensor, dtype: np.dtype) -> None:
        rows, groups = scales.shape
        super().__init__((rows, groups * 32), dtype, (blocks, scales), unit=(1, 32))

    def decode(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Decode a region."""
        blocks, scales = self._parts
        cut = [slice(top, bottom), slice(left // 32, right // 32)]
        value = unpack(blocks.read(cut))
        exponent = scales.read(cut).astype(np.int32) - 127
        return np.ldexp(value, exponent[..., None]).reshape(bottom - top, -1)


def mxfp4(name: str, blocks: LazyTensor, scales: LazyTensor, dtype: np.dtype) -> LazyTensor:
    """Return gpt-oss experts [experts, inputs, outputs] of blocks [experts, outputs, groups, 16].

    Raises:
        FormatError: shapes that do not fit.
    """
    if blocks.ndim != 4 or blocks.shape[3] != 16 or blocks.shape[:3] != scales.shape:
        raise FormatError(
            f"{name}: MXFP4 blocks {list(blocks.shape)} and scales {list(scales.shape)}"
        )
    experts, rows, groups, _ = blocks.shape
    flat = Mxfp4(
        blocks.reshape((experts * rows, groups, 16)),
        scales.reshape((experts * rows, groups)),
        dtype,
    )
    return flat.reshape((experts, rows, groups * 32)).permute((0, 2, 1))


class Nvfp4(Decoded):
    """``value * scale * factor`` with one FP8 scale for 16 columns."""

    __slots__ = ("_divide",)

    def __init__(self, parts: tuple[LazyTensor, ...], dtype: np.dtype, *, divide: bool) -> None:
        packed = parts[0]
        super().__init__((packed.shape[0], packed.shape[1] * 2), dtype, parts, unit=(1, 16))
        self._divide = divide

    def decode(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Decode a region."""
        packed, scales, factor = self._parts
        value = unpack(region(packed, top, bottom, left // 2, right // 2))
        scale = region(scales, top, bottom, left // 16, right // 16).astype(F32)
        whole = rows_of(factor, 0, 1).astype(F32).reshape(())
        scale = scale / whole if self._divide else scale * whole
        return value * np.repeat(scale, 16, axis=1)


def nvfp4(
    name: str,
    packed: LazyTensor,
    scale: LazyTensor,
    factor: LazyTensor,
    dtype: np.dtype,
    *,
    divide: bool,
    input_factor: LazyTensor | None = None,
) -> LazyTensor:
    """Return the weight of packed bytes [rows, columns / 2].

    Args:
        scale: FP8 [rows, columns / 16].
        factor: the tensor's own scale; the values are divided by it where ``divide`` says so.
        input_factor: that of the layer's input, where there is one.

    Raises:
        FormatError: shapes that do not fit.
    """  # fmt: skip
    fits = packed.ndim == scale.ndim == 2 and factor.size == 1
    if not fits or scale.shape != (packed.shape[0], packed.shape[1] // 8) or packed.shape[1] % 8:
        raise FormatError(f"{name}: NVFP4 {list(packed.shape)} and scales {list(scale.shape)}")
    factor = factor.reshape((1,))
    whole = [None if f is None else _multiplier(f, divide=divide) for f in (factor, input_factor)]
    codes = Floats("NVFP4", packed, scale.map(_bits, np.dtype(np.uint8)), *whole)
    return Coded(Nvfp4((packed, scale, factor), dtype, divide=divide), codes)


def _bits(scale: np.ndarray) -> np.ndarray:
    return scale.view(np.uint8)


def _multiplier(factor: LazyTensor, *, divide: bool) -> LazyTensor:
    whole = factor.reshape((factor.size,)).cast(F32)
    return whole.map(lambda x: np.float32(1) / x) if divide else whole


def packed_mxfp4(name: str, packed: LazyTensor, scale: LazyTensor, dtype: np.dtype) -> LazyTensor:
    """Return the weight of packed bytes [rows, columns / 2] and exponents [rows, columns / 32].

    Raises:
        FormatError: shapes that do not fit.
    """
    fits = packed.ndim == scale.ndim == 2 and packed.shape == (scale.shape[0], scale.shape[1] * 16)
    if not fits or scale.dtype != np.uint8:
        raise FormatError(
            f"{name}: MXFP4 {list(packed.shape)} and scales {list(scale.shape)} {scale.dtype}"
        )
    blocks = packed.reshape((*scale.shape, 16))
    return Coded(Mxfp4(blocks, scale, dtype), Floats("MXFP4", packed, scale))
