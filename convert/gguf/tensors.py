"""The tensors of an open GGUF file as lazy tensors: plain types as file ranges, blocks decoded.

A quantized tensor is decoded when a region is read, only the rows and blocks the region touches, so
requantizing or merging a GGUF model needs no more memory than one slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from ...errors import UnsupportedError
from ...quant import GgmlType, dequantize
from ...shardio.box import Box, extent
from ...shardio.chunked import Chunked
from ...shardio.source import FileSource
from ...shardio.tensor import LazyTensor
from .reader import GgufFile, TensorInfo

_PLAIN: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I8": np.dtype(np.int8), "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
}  # fmt: skip


class BlockTensor(LazyTensor):
    """A quantized tensor: float32 values decoded from ggml blocks on reading."""

    __slots__ = ("_blocks", "_kind")

    def __init__(self, blocks: LazyTensor, kind: GgmlType) -> None:
        """Take the encoded rows, uint8 [..., row bytes], and their type."""
        *lead, row_bytes = blocks.shape
        super().__init__((*lead, row_bytes // kind.bytes * kind.block), np.dtype(np.float32))
        self._blocks = blocks
        self._kind = kind

    @property
    def blocks(self) -> LazyTensor:
        """The encoded rows."""
        return self._blocks

    @property
    def kind(self) -> GgmlType:
        """Their type."""
        return self._kind

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Decode the blocks that the region touches."""
        (*lead_lo, low), (*lead_hi, high) = box
        first, last = low // self._kind.block, -(-high // self._kind.block)
        bytes_box = (
            (*lead_lo, first * self._kind.bytes),
            (*lead_hi, last * self._kind.bytes),
        )
        data = np.empty(extent(bytes_box), np.uint8)
        self._blocks.fill(data, bytes_box)
        start = first * self._kind.block
        shape = (*data.shape[:-1], (last - first) * self._kind.block)
        out[...] = dequantize(data, self._kind, shape, threads=1)[..., low - start : high - start]

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The encoded bytes."""
        return self._blocks.spans()


class GgufTensors:
    """Lazy access to the tensors of an open file."""

    def __init__(self, file: GgufFile) -> None:
        """Stat the files once.

        Raises:
            UnsupportedError: the file is big-endian.
        """
        if file.big_endian:
            raise UnsupportedError(
                f"{file.paths[0]}: is a big-endian GGUF; convert the checkpoint again instead"
            )
        self._file = file
        self._sources = {path: FileSource.of(path) for path in file.paths}

    def values(self, name: str) -> LazyTensor:
        """Return a tensor's values; quantized ones are decoded to float32."""
        info = self._file.tensors[name]
        dtype = _PLAIN.get(info.type.name)
        if dtype is not None:
            return Chunked.contiguous(self._sources[info.path], info.offset, info.shape, dtype)
        return BlockTensor(self._rows(info), info.type)

    def stored(self, name: str) -> LazyTensor:
        """Return a tensor as it is stored: its own dtype, or uint8 [..., row bytes] of blocks."""
        info = self._file.tensors[name]
        return self.values(name) if info.type.name in _PLAIN else self._rows(info)

    def _rows(self, info: TensorInfo) -> Chunked:
        shape = (*info.shape[:-1], info.type.row_bytes(info.shape[-1]))
        return Chunked.contiguous(self._sources[info.path], info.offset, shape, np.dtype(np.uint8))
