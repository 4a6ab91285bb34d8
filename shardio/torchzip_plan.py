"""Planning ``torch.save`` files: every byte's place is known before a tensor is read.

The zip of ``torch/serialization.py``: stored entries in one folder (``data.pkl``, ``byteorder``,
``data/<key>``, ``version``, ``.data/serialization_id``), tensor data on multiples of 64 bytes.
Checksums of tensor entries are 0, as torch writes them under
``torch.serialization.set_crc32_options(False)``: no loader of torch looks at them, and computing
them would cost half of the copy again (0.14 s per GB), its shortcut through the kernel, and headers
that are known before the data. Only tools that check them (``unzip -t``) complain.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from . import dtypes
from .box import Index, row_major
from .payload import BytesPayload, Payload, RangePayload, TensorPayload
from .pickle_write import Call, Name, Persistent, dumps
from .stream import OutFile
from .tensor import LazyTensor, from_array

Part = tuple[int, Payload]

_ALIGN = 64
_WIDE = 0xFFFFFFFF  # sizes and offsets from here on need zip64
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_DATE = 0x21  # 1980-01-01, the earliest a zip can say; files must not depend on the clock
_STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage", "int64": "LongStorage", "int32": "IntStorage",
    "int16": "ShortStorage", "int8": "CharStorage", "uint8": "ByteStorage", "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
}  # fmt: skip


Run = tuple[LazyTensor, int, int]  # elements from the second number to the third, row-major


@dataclass(frozen=True, slots=True)
class Vector:
    """A flat tensor put together of pieces; what no piece fills is zero.

    Attributes:
        dtype: of all pieces.
        size: elements.
        pieces: (first element, elements that follow there), without overlap.
    """

    dtype: np.dtype
    size: int
    pieces: tuple[tuple[int, Run], ...] = ()


@dataclass(frozen=True, slots=True)
class Archive:
    """A planned zip: its size, and what lies where."""

    size: int
    parts: tuple[Part, ...]


def plan_torch_file(name: str, root: Any) -> OutFile:
    """Plan a ``torch.save`` file.

    Args:
        name: path in the output folder; its stem names the folder in the zip, as with torch.
        root: plain data, the classes of ``pickle_write``, and as tensors: LazyTensor, Vector,
            np.ndarray. The same LazyTensor or Vector object twice is one storage (tied weights).

    Raises:
        UnsupportedError: a value or an element type that torch files cannot hold.
    """
    (file,) = plan_torch_files([name], root)
    return file


def plan_torch_files(names: Iterable[str], root: Any) -> Iterator[OutFile]:
    """Plan several files of the same content, which is pickled once; see ``plan_torch_file``."""
    pickled = _pickled(root)
    for name in names:
        folder = name.rpartition("/")[2].rpartition(".")[0] or "archive"
        archive = _archive(pickled, folder)
        yield OutFile(name, archive.size, archive.parts)


def plan_archive(root: Any, folder: str = "archive") -> Archive:
    """Plan the zip of one object; see ``plan_torch_file``."""
    return _archive(_pickled(root), folder)


_Pickled = tuple[bytes, list[tuple[str, LazyTensor | Vector]]]  # with the storages by key


def _pickled(root: Any) -> _Pickled:
    storages: dict[int, tuple[str, LazyTensor | Vector]] = {}
    return dumps(root, lambda value: _lower(value, storages)), list(storages.values())


def _archive(pickled: _Pickled, folder: str) -> Archive:
    pickle, storages = pickled
    zip_ = _Zip(folder)
    zip_.small("data.pkl", pickle)
    zip_.small("byteorder", b"little")
    for key, tensor in storages:
        zip_.tensor(f"data/{key}", tensor)
    zip_.small("version", b"3\n")
    digest = int.from_bytes(hashlib.sha256(pickle).digest(), "big")
    zip_.small(".data/serialization_id", f"{digest % 10**40:040d}".encode())
    return zip_.finish()


def plan_item(tensor: LazyTensor) -> Archive:
    """Plan the zip of one plain tensor; cheap for the thousands of equal pieces of a DCP."""
    if not tensor.size:
        return plan_archive(tensor)
    whole = _shell(tensor.dtype, tensor.shape)
    head, tail = whole.parts
    return Archive(whole.size, (head, (head[1].nbytes, TensorPayload(tensor)), tail))


@lru_cache(maxsize=4096)
def _shell(dtype: np.dtype, shape: Index) -> Archive:
    """The two parts around the data of such a tensor, which all of its kind share."""
    return plan_archive(_Shaped(Vector(dtype, prod(shape)), shape))


@dataclass(frozen=True, slots=True)
class _Shaped:
    """A vector seen with a shape."""

    vector: Vector
    shape: Index


def _lower(value: Any, storages: dict[int, tuple[str, LazyTensor | Vector]]) -> Any:
    """Turn a tensor into the calls that torch's unpickler expects."""
    if isinstance(value, np.ndarray):
        value = from_array(value)
    shape = value.shape if isinstance(value, (LazyTensor, _Shaped)) else (value.size,)
    data: LazyTensor | Vector = value.vector if isinstance(value, _Shaped) else value
    key = storages.setdefault(id(data), (str(len(storages)), data))[0]
    count = prod(shape)
    name = dtypes.name(data.dtype)
    if name in _STORAGES:
        pid = ("storage", Name("torch", _STORAGES[name]), key, "cpu", count)
        place: tuple[Any, ...] = (Persistent(pid), 0, shape, row_major(shape), False, OrderedDict())
        return Call(Name("torch._utils", "_rebuild_tensor_v2"), place)
    raw = count * data.dtype.itemsize
    untyped = ("storage", Name("torch.storage", "UntypedStorage"), key, "cpu", raw)
    place = (Persistent(untyped), 0, shape, row_major(shape), False, OrderedDict(), data.dtype)
    return Call(Name("torch._utils", "_rebuild_tensor_v3"), place)


@dataclass(slots=True)
class _Zip:
    """A zip being laid out. Small bytes gather in ``pending`` until a tensor follows."""

    folder: str
    at: int = 0
    parts: list[Part] = field(default_factory=list)
    pending: bytearray = field(default_factory=bytearray)
    directory: bytearray = field(default_factory=bytearray)
    count: int = 0

    def small(self, name: str, data: bytes) -> None:
        """Add an entry at hand."""
        self._header(name, len(data), zlib.crc32(data))
        self.pending += data
        self.at += len(data)

    def tensor(self, name: str, tensor: LazyTensor | Vector) -> None:
        """Add an entry that is streamed."""
        size = tensor.size * tensor.dtype.itemsize
        self._header(name, size, 0)
        if not size:
            return
        self._flush()
        if isinstance(tensor, LazyTensor):
            self.parts.append((self.at, TensorPayload(tensor)))
        else:
            for start, (piece, lo, hi) in tensor.pieces:
                assert piece.dtype == tensor.dtype, "a vector has one element type"
                if lo < hi:
                    place = self.at + start * tensor.dtype.itemsize
                    self.parts.append((place, RangePayload(piece, lo, hi)))
        self.at += size

    def finish(self) -> Archive:
        """Add the directory and its end records."""
        start, size = self.at, len(self.directory)
        self._bytes(bytes(self.directory))
        if start >= _WIDE or self.count >= 0xFFFF:
            wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, self.count, self.count,
                               size, start)  # fmt: skip
            self._bytes(wide + struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1))
        count = min(self.count, 0xFFFF)
        self._bytes(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, min(start, _WIDE),
                                0))  # fmt: skip
        self._flush()
        return Archive(self.at, tuple(self.parts))

    def _header(self, name: str, size: int, crc: int) -> None:
        """Write a local header, padded so that the data is aligned, and its directory entry."""
        path = f"{self.folder}/{name}".encode()
        local = b""
        central = b""
        if size >= _WIDE:
            local = struct.pack("<HHQQ", 1, 16, size, size)
            central = struct.pack("<QQ", size, size)
        if self.at >= _WIDE:
            central += struct.pack("<Q", self.at)
        if central:
            central = struct.pack("<HH", 1, len(central)) + central
        version = 45 if central else 20
        short = min(size, _WIDE)
        data_at = self.at + _LOCAL.size + len(path) + len(local) + 4
        padding = -data_at % _ALIGN
        local += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        self.count += 1
        self.directory += _CENTRAL.pack(
            b"PK\1\2", version, version, 0, 0, 0, _DATE, crc, short, short, len(path), len(central),
            0, 0, 0, 0, min(self.at, _WIDE),
        )  # fmt: skip
        self.directory += path + central
        header = _LOCAL.pack(
            b"PK\3\4", version, 0, 0, 0, _DATE, crc, short, short, len(path), len(local)
        )
        self._bytes(header + path + local)

    def _bytes(self, data: bytes) -> None:
        self.pending += data
        self.at += len(data)

    def _flush(self) -> None:
        if self.pending:
            start = self.at - len(self.pending)
            self.parts.append((start, BytesPayload(bytes(self.pending))))
            self.pending.clear()
