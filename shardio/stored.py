"""From what the safe unpickler gives to what a checkpoint holds: lazy tensors and plain data.

``lazy`` turns a ``StoredTensor`` (a strided view of a storage in a file) into a lazy tensor over
that file; ``plain`` turns settings, counters and schedules with whatever classes they have into
dicts, lists, text and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .chunked import Chunked
from .records import Global, Record, StoredTensor
from .source import FileSource
from .tensor import LazyTensor
from .torchfile import read_stored

_MAX_VALUES = 4096  # elements of a tensor that becomes plain data
_MAX_NODES = 200_000
_MAX_DEPTH = 40


def lazy(tensor: StoredTensor, source: FileSource | None = None) -> LazyTensor:
    """Return the lazy tensor of a stored one, in native byte order.

    Args:
        tensor: the view.
        source: the file it lies in, when the caller has it already (saves a stat per tensor).

    Raises:
        FormatError: the file cannot be opened.
    """
    if source is None:
        source = FileSource.of(tensor.storage.path)
    item = tensor.dtype.itemsize
    strides = [s * item for s in tensor.strides]
    found = Chunked.strided(source, tensor.file_offset, tensor.shape, strides, tensor.dtype)
    return found.map(_swap) if tensor.storage.big_endian and item > 1 else found


def _swap(array: np.ndarray) -> np.ndarray:
    return array.byteswap()


def identity(tensor: StoredTensor) -> tuple[object, ...]:
    """Return what two views of the very same bytes have in common (tied weights)."""
    storage = tensor.storage
    return (storage.path, storage.offset, tensor.storage_offset, tensor.shape, tensor.strides)


def plain(value: object) -> Any:
    """Return settings as plain data: dict (text keys), list, str, int, float, bool, None.

    Objects become dicts of their fields, small tensors and arrays nested lists, classes their
    names; what is large, nested too deeply or otherwise not data becomes a short text.

    Raises:
        FormatError: a small tensor cannot be read.
    """
    return _Plain().convert(value, 0)


def is_whole(value: object) -> bool:
    """Whether a value that ``plain`` made is all there: no text that stands for something lost."""
    if isinstance(value, Mapping):
        return all(isinstance(k, (str, int)) and is_whole(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_whole(v) for v in value)
    if isinstance(value, str):
        return not value.startswith("<")
    return value is None or isinstance(value, (bool, int, float))


class _Plain:
    """One conversion; counts what it made so that shared substructures cannot explode."""

    def __init__(self) -> None:
        self.nodes = 0

    def convert(self, value: object, depth: int) -> Any:
        self.nodes += 1
        if depth > _MAX_DEPTH or self.nodes > _MAX_NODES:
            return "<left out: too large>"
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Mapping):
            return self._dict(value, depth)
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.convert(v, depth + 1) for v in value]
        if type(value) is StoredTensor:
            if value.numel > _MAX_VALUES:
                return f"<tensor {value.dtype} {list(value.shape)}>"
            return self.convert(read_stored(value), depth)
        if isinstance(value, (np.ndarray, np.generic)):
            return self._numbers(value)
        if type(value) is Record:
            return self._record(value, depth)
        if type(value) is Global:
            return value.name
        if isinstance(value, (bytes, bytearray)):
            return f"<{len(value)} bytes>"
        return str(value)[:200]

    def _dict(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        return {str(k): self.convert(v, depth + 1) for k, v in value.items()}

    def _record(self, value: Record, depth: int) -> Any:
        if value.fields:
            return self._dict(value.fields, depth)
        if value.mapping is not None:
            return self._dict(value.mapping, depth)
        if value.items is not None:
            return [self.convert(v, depth + 1) for v in value.items]
        if len(value.args) == 1 and type(value.args[0]) in (int, str):  # an enum member
            return value.args[0]
        return f"<{value.name[:200]}>"

    def _numbers(self, value: np.ndarray | np.generic) -> Any:
        if value.size > _MAX_VALUES or value.dtype.kind in "OM":
            return f"<array {value.dtype} {list(value.shape)}>"
        wide = value if value.dtype.kind in "biufcSU" else value.astype(np.float64)
        return wide.tolist()
