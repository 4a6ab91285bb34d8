"""The items of a PyTorch distributed checkpoint: found at their first read, not at open.

Each tensor item in a ``.distcp`` file is a whole ``torch.save`` archive (source: torch's
``filesystem.py``), so where its bytes start is known only after reading the archive's directory.
A checkpoint has tens of thousands of items; opening must not touch them. ``ItemSource`` therefore
takes positions counted from the start of the item and finds the true place at the first read.
Items compressed by ``_extension.py`` (``stream.zstd/1``) are unpacked into unlinked temporary
files.
"""

from __future__ import annotations

import os
import tempfile
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import FormatError, UnsupportedError
from .box import Index
from .dcp_metadata import Item
from .records import StoredTensor
from .source import FileSource, open_file
from .spill import SPILLS, Spill
from .stored import lazy
from .tensor import LazyTensor
from .torchfile import TorchFile, open_torch_file

_ZSTD = "stream.zstd/"
_BLOCK = 1 << 20
_OVERHEAD = 1 << 20  # of an archive around the tensor's bytes
_MAX_OBJECT = 1 << 30


class ItemSource:
    """The raw bytes of one tensor item, in row-major order.

    Positions are nominal: the first byte of the tensor is at ``item.offset``, so that sorting by
    position is sorting by place in the file. ``locate`` gives the true one.
    """

    __slots__ = ("_dtype", "_file", "_found", "_item", "_key", "_shape")

    def __init__(
        self, file: FileSource, item: Item, key: str, shape: Index, dtype: np.dtype
    ) -> None:
        self._file, self._item, self._key = file, item, key
        self._shape, self._dtype = shape, dtype
        self._found: LazyTensor | int | None = None

    @property
    def path(self) -> Path:
        """The ``.distcp`` file."""
        return self._file.path

    @property
    def size(self) -> int:
        """Nominal end: the item's offset plus the bytes of the tensor."""
        return self._item.offset + prod(self._shape) * self._dtype.itemsize

    def locate(self, offset: int) -> tuple[FileSource, int] | None:
        """Return (file, true position) of a nominal position; None when packed or strided.

        Raises:
            FormatError: the item is not the tensor that the metadata promises.
        """
        if self._item.transforms:
            return None
        found = self._resolve()
        return (self._file, found + offset - self._item.offset) if type(found) is int else None

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from a nominal position.

        Raises:
            FormatError: the item is not the tensor that the metadata promises, or is short.
        """
        start = offset - self._item.offset
        if self._item.transforms:
            spill = SPILLS.get((self.path, self._item), self._unpack)
            spill.readinto(start, buffer)
            return
        found = self._resolve()
        if type(found) is int:
            self._file.readinto(found + start, buffer)
        else:
            assert isinstance(found, LazyTensor)
            _read_flat(found, start, buffer)

    def _resolve(self) -> LazyTensor | int:
        """Return the position of the first byte, or a flat tensor when the bytes lie strided."""
        if self._found is None:
            tensor = self._check(open_torch_file(self.path, self._item.offset, self._item.length))
            odd = not tensor.contiguous or (tensor.storage.big_endian and tensor.dtype.itemsize > 1)
            self._found = lazy(tensor, self._file).reshape((-1,)) if odd else tensor.file_offset
        return self._found

    def _check(self, file: TorchFile) -> StoredTensor:
        root = file.root
        if type(root) is not StoredTensor or (root.shape, root.dtype) != (self._shape, self._dtype):
            held = f"{root.dtype} {root.shape}" if type(root) is StoredTensor else "no plain tensor"
            raise FormatError(
                f"{self.path}: the item of {self._key!r} at byte {self._item.offset} holds {held}, "
                f"the metadata promises {self._dtype} {self._shape}: the file belongs to another "
                "rank or another save"
            )
        return root

    def _unpack(self) -> Spill:
        expected = self.size - self._item.offset
        with unpacked(self.path, self._item, expected + _OVERHEAD) as file:
            tensor = self._check(open_torch_file(Path(file.name)))
            fd = os.dup(file.fileno())
        if not tensor.contiguous or tensor.storage.big_endian:
            os.close(fd)
            raise UnsupportedError(f"{self.path}: {self._key!r} is compressed and strided at once")
        return Spill(self.path, fd, tensor.file_offset)


def read_object(folder: Path, item: Item) -> object:
    """Return the object of a non-tensor item as the safe unpickler gives it.

    Raises:
        FormatError: damaged item.
        UnsupportedError: unknown transforms, or zstd without the ``zstandard`` package.
    """
    if not item.transforms:
        return open_torch_file(folder / item.file, item.offset, item.length).root
    with unpacked(folder / item.file, item, _MAX_OBJECT) as file:
        return open_torch_file(Path(file.name)).root


def unpacked(path: Path, item: Item, limit: int) -> tempfile._TemporaryFileWrapper[bytes]:
    """Return a temporary file with the item's bytes (at most ``limit``), its transforms undone.

    Raises:
        UnsupportedError: unknown transforms, or zstd without the ``zstandard`` package.
        FormatError: damaged data, or more of it than ``limit``.
    """
    check_transforms(path, item)
    import zstandard

    out = tempfile.NamedTemporaryFile(prefix="mconv-")  # noqa: SIM115  # the caller closes it
    try:
        with open_file(path) as file:
            window = _Window(file, item)
            inflate = zstandard.ZstdDecompressor().stream_reader
            reader = inflate(window, read_across_frames=True)  # type: ignore[arg-type]  # reads only
            while block := reader.read(_BLOCK):
                out.write(block)
                if out.tell() > limit:
                    raise FormatError(f"{path}: item at byte {item.offset} unpacks to too much")
        out.flush()
    except zstandard.ZstdError as e:
        out.close()
        raise FormatError(f"{path}: item at byte {item.offset}: damaged zstd data ({e})") from None
    except BaseException:
        out.close()
        raise
    return out


class _Window:
    """Reads an item's bytes and no others."""

    def __init__(self, file: BinaryIO, item: Item) -> None:
        file.seek(item.offset)
        self._file, self._left = file, item.length

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, none at the end of the item."""
        block = self._file.read(min(size, self._left))
        self._left -= len(block)
        return block


def check_transforms(path: Path, item: Item) -> None:
    """Raise UnsupportedError unless the item's transforms can be undone here."""
    if len(item.transforms) != 1 or not item.transforms[0].startswith(_ZSTD):
        raise UnsupportedError(
            f"{path}: items were written through {', '.join(item.transforms)}; mconv can undo "
            "stream.zstd only"
        )
    try:
        import zstandard  # noqa: F401  # only whether it is there
    except ImportError:
        raise UnsupportedError(
            f"{path}: items are zstd-compressed: install the reader with 'pip install mconv[zstd]'"
        ) from None


def _read_flat(tensor: LazyTensor, start: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from byte ``start`` of a 1-d tensor's elements."""
    item = tensor.dtype.itemsize
    first, end = start // item, -(-(start + len(buffer)) // item)
    data = tensor.read([slice(first, end)]).view(np.uint8)
    skip = start - first * item
    buffer[:] = data[skip : skip + len(buffer)].data
