"""GGUF for big-endian machines: the numbers inside tensor data, bytes the other way round.

Plain types are swapped number by number, blocks field by field: ggml's blocks hold 16-bit scales
among bytes that have no order. Only blocks whose packed bits big-endian builds read as bytes are
known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from ...errors import UnsupportedError
from ...quant import GgmlType
from ...shardio.box import Box, extent
from ...shardio.payload import Payload, Render, Slab, TensorPayload, row_slabs
from ...shardio.tensor import LazyTensor

#: Bytes of one number of the plain types.
_PLAIN: Mapping[str, int] = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8,
}  # fmt: skip
#: Where the 16-bit scales of a block are.
_SCALES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q6_K": (208,),
    "MXFP4": (),
}


def swapped(payload: Payload, kind: GgmlType, name: str) -> Payload:
    """Return the payload of a tensor for the other byte order.

    Raises:
        UnsupportedError: a type that is not known in the other order.
    """
    if kind.name not in _PLAIN and kind.name not in _SCALES:
        known = ", ".join((*_PLAIN, *_SCALES))
        raise UnsupportedError(
            f"tensor {name!r} is {kind.name}, which cannot be written big-endian; types that can: "
            f"{known}"
        )
    return _Swapped(payload, kind)


def swap_bytes(data: np.ndarray, kind: GgmlType) -> np.ndarray:
    """Return encoded rows (uint8, whole blocks) in the other byte order."""
    width = _PLAIN.get(kind.name)
    if width is not None:
        return data.reshape(-1, width)[:, ::-1].reshape(-1)
    out = data.reshape(-1, kind.bytes).copy()
    for at in _SCALES[kind.name]:
        out[:, [at, at + 1]] = out[:, [at + 1, at]]
    return out.reshape(-1)


@dataclass(frozen=True, slots=True)
class _Swapped:
    """A payload whose numbers are turned round as it is produced."""

    payload: Payload
    kind: GgmlType

    @property
    def nbytes(self) -> int:
        """As before."""
        return self.payload.nbytes

    def first_span(self) -> tuple[str, int]:
        """As before."""
        return self.payload.first_span()

    def slabs(self, limit: int) -> Iterator[Slab]:
        """Whole rows, read into memory: nothing can be copied any more."""
        if isinstance(self.payload, TensorPayload):
            yield from self._rows(self.payload.tensor, limit)
            return
        for slab in self.payload.slabs(limit // 2):
            assert isinstance(slab, Render), "only stored tensors are copied"
            yield Render(slab.at, slab.nbytes, partial(self._swap, slab.make))

    def _rows(self, tensor: LazyTensor, limit: int) -> Iterator[Slab]:
        size = tensor.dtype.itemsize
        for box, start in row_slabs(tensor.shape, max(1, limit // (4 * size)), whole_rows=True):
            make = partial(_read, tensor, box)
            yield Render(start * size, prod(extent(box)) * size, partial(self._swap, make))

    def _swap(self, make: Callable[[], np.ndarray | bytes]) -> np.ndarray:
        made = make()
        raw = np.frombuffer(made, np.uint8) if isinstance(made, bytes) else _bytes(made)
        return np.ascontiguousarray(swap_bytes(raw, self.kind))


def _read(tensor: LazyTensor, box: Box) -> np.ndarray:
    return tensor.read(tuple(slice(a, b) for a, b in zip(*box, strict=True)))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
