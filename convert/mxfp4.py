"""MXFP4 and NVFP4 as Hugging Face stores them and as ggml does: the same numbers, bytes rearranged.

32 values share one exponent byte. Hugging Face keeps the 16 bytes of a block in ``*_blocks``, value
2i in the low half of byte i, and the exponents in ``*_scales``; ggml puts the exponent first and
value i and i + 16 into byte i (OCP Microscaling formats; ggml's ``block_mxfp4``). NVFP4 has an FP8
scale per 16 values; ggml joins four of these: their scales, then 8 bytes each (``block_nvfp4``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..errors import FormatError
from ..quant import type_by_name
from ..shardio.box import Box, extent
from ..shardio.tensor import LazyTensor, concat
from .gguf.tensors import BlockTensor

_BYTES = 16


class _Block(LazyTensor):
    """A function of whole last dims that keeps the shape."""

    __slots__ = ("_base", "_fn")

    def __init__(self, base: LazyTensor, fn: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(base.shape, base.dtype)
        self._base = base
        self._fn = fn

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Read the last dim whole, apply the function, keep what is asked for."""
        (*low, start), (*high, end) = box
        whole = (*low, 0), (*high, self.shape[-1])
        data = np.empty(extent(whole), self.dtype)
        self._base.fill(data, whole)
        out[...] = self._fn(data)[..., start:end]

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The base's file pieces."""
        return self._base.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The base's leaves."""
        return self._base.leaves()


def _to_ggml(data: np.ndarray) -> np.ndarray:
    values = np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)
    half = data.shape[-1]
    return values[..., :half] | values[..., half:] << 4


def _from_ggml(data: np.ndarray) -> np.ndarray:
    values = np.concatenate([data & 15, data >> 4], -1)
    return values[..., ::2] | values[..., 1::2] << 4


def pack_mxfp4(blocks: LazyTensor, scales: LazyTensor) -> BlockTensor:
    """Return a tensor of ggml's blocks.

    Args:
        blocks: uint8 [..., columns / 32, 16].
        scales: uint8 [..., columns / 32].

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    want = (*scales.shape, _BYTES)
    if blocks.shape != want or {blocks.dtype, scales.dtype} != {np.dtype(np.uint8)}:
        raise ValueError(
            f"MXFP4 blocks {list(blocks.shape)} {blocks.dtype} and scales {list(scales.shape)} "
            f"{scales.dtype}: expected uint8 {list(want)} and its exponents"
        )
    joined = concat([scales.reshape((*scales.shape, 1)), _Block(blocks, _to_ggml)], scales.ndim)
    rows = joined.reshape((*scales.shape[:-1], scales.shape[-1] * (_BYTES + 1)))
    return BlockTensor(rows, type_by_name("MXFP4"))


def pack_nvfp4(packed: LazyTensor, scales: LazyTensor, name: str) -> BlockTensor:
    """Return a matrix of ggml's blocks, without the factor of the whole tensor.

    Args:
        packed: uint8 [rows, columns / 2], columns a multiple of 64.
        scales: uint8 [rows, columns / 16], the bits of positive E4M3 numbers.
        name: for the message when they are not, on reading.
    """
    rows, groups = scales.shape

    def positive(data: np.ndarray) -> np.ndarray:
        if (data >= 0x7F).any():
            raise FormatError(f"{name}: NVFP4 scales are negative or NaN: the file is damaged")
        return data

    halves = _Block(packed.reshape((rows, groups, 8)), _to_ggml)
    view = (rows, groups // 4, 4)
    joined = concat([scales.map(positive).reshape(view), halves.reshape((*view[:2], 32))], 2)
    return BlockTensor(joined.reshape((rows, groups * 9)), type_by_name("NVFP4"))


def unpack_mxfp4(rows: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """Return Hugging Face's blocks and scales of ggml's rows, uint8 [..., row bytes]."""
    *lead, size = rows.shape
    view = rows.reshape((*lead, size // (_BYTES + 1), _BYTES + 1))
    before = [slice(None)] * (len(lead) + 1)
    scales = view.slice([*before, slice(0, 1)]).reshape(view.shape[:-1])
    return _Block(view.slice([*before, slice(1, _BYTES + 1)]), _from_ggml), scales
