"""Tensors into ggml bytes, for one output file or for several from the same read.

``encoded`` returns one payload per wanted type. Rows are read once per slab, checked for NaN and
infinity, and encoded for each output in turn; the rows of an expert meet that expert's importance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import ml_dtypes
import numpy as np

from ...errors import QuantError
from ...quant import ErrorSums, GgmlType, quantize
from ...shardio.box import Box, extent
from ...shardio.payload import Joint, Member, Payload, TensorPayload, first_span, row_slabs
from ...shardio.tensor import LazyTensor

_FLOATS: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
#: Exponent bits of the 16-bit types; all set means infinity or NaN.
_EXPONENT = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
_BYTES_PER_ELEMENT = 10  # beside the rows as read: a decoded or converted copy, and the result


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one output stores a tensor.

    Attributes:
        type: its ggml type.
        importance: float32 [stacks, cols], one row per matrix of the tensor, or None.
        best: search for less error than ggml leaves.
        errors: gets the errors of all rows added as they are encoded.
    """

    type: GgmlType
    importance: np.ndarray | None = None
    best: bool = False
    errors: ErrorSums | None = None


def encoded(tensor: LazyTensor, name: str, encodings: Sequence[Encoding]) -> list[Payload]:
    """Return the payloads that hold ``tensor`` in each encoding.

    Args:
        tensor: float values; anything but float32, float16 and bfloat16 is cast to float32.
        name: for messages.
        encodings: one per output; where two outputs pass the same object, rows are encoded once.

    Raises:
        QuantError: a type whose blocks do not divide the rows. Writing raises it for NaN and
            infinite values, and for values that the type cannot hold, with tensor and row.
    """
    if tensor.dtype not in _FLOATS.values():
        tensor = tensor.cast(_FLOATS["F32"])
    group = _Rows(tensor, name, tuple(encodings))
    return [Member(group, k) for k in range(len(encodings))]


def copied(tensor: LazyTensor) -> Payload:
    """Return the payload that holds ``tensor`` as it is, unchecked, copied if possible."""
    return TensorPayload(tensor)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A group of payloads over the rows of one tensor."""

    tensor: LazyTensor
    name: str
    encodings: tuple[Encoding, ...]

    @property
    def sizes(self) -> list[int]:
        """Encoded bytes of each output."""
        return [self._rows * n for n in self._row_bytes]

    @property
    def _rows(self) -> int:
        return prod(self.tensor.shape[:-1])

    @property
    def _row_bytes(self) -> list[int]:
        cols = self.tensor.shape[-1] if self.tensor.shape else 1
        return [e.type.row_bytes(cols) for e in self.encodings]

    def first_span(self) -> tuple[str, int]:
        """Where the tensor's first piece lies."""
        return first_span(self.tensor)

    def joints(self, limit: int, members: Sequence[int]) -> Iterator[Joint]:
        """Whole rows per slab, for all wanted outputs."""
        if not self.tensor.size:
            return
        tensor = self.tensor if self.tensor.ndim else self.tensor.reshape((1,))
        cols = tensor.shape[-1]
        sizes = self._row_bytes
        budget = limit // (tensor.dtype.itemsize + _BYTES_PER_ELEMENT)
        for box, start in row_slabs(tensor.shape, max(cols, budget), whole_rows=True):
            first, rows = start // cols, prod(extent(box)[:-1])
            places = tuple((k, first * sizes[k], rows * sizes[k]) for k in members)
            yield Joint(places, partial(self._make, tensor, box, first, tuple(members)))

    def _make(
        self, tensor: LazyTensor, box: Box, first: int, members: Sequence[int]
    ) -> Iterator[np.ndarray]:
        rows = tensor.read(tuple(slice(a, b) for a, b in zip(*box, strict=True)))
        rows = rows.reshape(-1, tensor.shape[-1])
        bad = not_finite(rows)
        if bad is not None:
            row, col = bad
            raise QuantError(
                f"tensor {self.name!r}, row {first + row}, column {col}: the value is "
                f"{float(rows[row, col])}; the weights are broken, no type can hold them"
            )
        made: dict[int, np.ndarray] = {}  # outputs that share an encoding share the work
        for k in members:
            encoding = self.encodings[k]
            if id(encoding) not in made:
                made[id(encoding)] = self._encode(rows, first, encoding)
            yield made[id(encoding)]

    def _encode(self, rows: np.ndarray, first: int, encoding: Encoding) -> np.ndarray:
        """Encode rows, those of each matrix with its own importance."""
        encode = partial(quantize, threads=1, best=encoding.best, errors=encoding.errors)
        try:
            if encoding.importance is None:
                return encode(rows, encoding.type)
            out = np.empty((len(rows), encoding.type.row_bytes(rows.shape[1])), np.uint8)
            per_matrix = self._rows // len(encoding.importance)
            for start, stop, matrix in _matrices(first, len(rows), per_matrix):
                importance = encoding.importance[matrix]
                encode(rows[start:stop], encoding.type, importance, out=out[start:stop])
            return out
        except QuantError as error:
            last = first + len(rows) - 1
            raise QuantError(f"tensor {self.name!r}, rows {first} to {last}: {error}") from error


def _matrices(first: int, rows: int, per_matrix: int) -> Iterator[tuple[int, int, int]]:
    """Cut ``rows`` rows from row ``first`` where matrices end: (start, stop, matrix)."""
    start = 0
    while start < rows:
        matrix, inside = divmod(first + start, per_matrix)
        stop = min(rows, start + per_matrix - inside)
        yield start, stop, matrix
        start = stop


def not_finite(rows: np.ndarray) -> tuple[int, int] | None:
    """Return (row, column) of the first NaN or infinity in a float matrix, or None."""
    check = _finite_test(rows.dtype)
    step = max(1, (1 << 18) // max(1, rows.shape[1]))  # stays in cache
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        fine = check(part)
        if not fine.all():
            row, col = np.unravel_index(int(np.argmin(fine)), part.shape)
            return start + int(row), int(col)
    return None


def _finite_test(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    mask = _EXPONENT.get(dtype)
    if mask is None:
        return np.isfinite
    bits = np.uint16(mask)
    return lambda part: (part.view(np.uint16) & bits) != bits
