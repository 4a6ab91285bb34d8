"""Open what ``torch.save`` wrote: the object with all tensors as file ranges, no tensor byte read.

Formats, after ``torch/serialization.py``: the zip archive (since 1.6; data.pkl, byteorder,
data/KEY), also embedded at any offset of a larger file, and the legacy stream (magic, protocol
1001, system info, pickle, keys, storages). The tar files of torch before 0.1.10 and TorchScript
archives are refused. Nothing is executed (see ``unpickle``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..errors import FormatError, UnsupportedError
from .records import Storage, StoredTensor
from .source import open_descriptor, open_file
from .torchlegacy import is_legacy, parse_storage_id, read_legacy
from .torchzip import FileSlice, ZipDirectory
from .unpickle import loads

_MAX_PICKLE = 512 << 20
_KNOWN_OTHERS = (
    (b"version https://git-lfs", "a git-lfs pointer: fetch the real file with 'git lfs pull'"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "a web page or XML, not a checkpoint: the download went wrong"),
)


@dataclass(frozen=True, slots=True)
class TorchFile:
    """An opened file.

    Attributes:
        path: the file.
        root: the saved object; dicts, lists, Records, and ``StoredTensor`` for tensors.
        kind: "zip" or "legacy".
        big_endian: tensor bytes are stored big-endian (each ``Storage`` says so, too).
        storages: every storage that the object refers to, by key.
        archive: name of the zip's only folder, "" for legacy files. torch takes it from the name
            the file had when it was saved, so it gives away files that were renamed or swapped.
    """

    path: Path
    root: object
    kind: str
    big_endian: bool
    storages: dict[str, Storage]
    archive: str = ""


def open_torch_file(path: Path, offset: int = 0, length: int | None = None) -> TorchFile:
    """Read the structure of a torch.save file, or of one embedded in a larger file.

    Args:
        path: the file.
        offset: first byte of the archive in the file.
        length: bytes of the archive; to the end of the file if None.

    Raises:
        FormatError: missing, truncated, damaged or hostile data.
        UnsupportedError: TorchScript or tar files.
    """
    try:
        fd = open_descriptor(path)
    except OSError as e:
        raise FormatError(f"{path}: cannot be opened: {e.strerror}") from None
    try:
        size = os.fstat(fd).st_size
        if length is None:
            length = size - offset
        if offset < 0 or length < 0 or offset + length > size:
            raise FormatError(
                f"{path}: truncated: bytes {offset} to {offset + length} are needed, it has {size}"
            )
        return _open(FileSlice(fd, path, offset, length))
    except OSError as e:
        raise FormatError(f"{path}: cannot be read: {e.strerror}") from None
    finally:
        os.close(fd)


def _open(source: FileSlice) -> TorchFile:
    start = source.read(0, min(source.length, 512))
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _open_zip(source)
    if is_legacy(start):
        root, storages, big_endian = read_legacy(source)
        return TorchFile(source.path, root, "legacy", big_endian, storages)
    return _refuse(source, start)


def _refuse(source: FileSlice, start: bytes) -> NoReturn:
    if not source.length:
        source.fail("the file is empty; the save or the copy did not finish")
    if start[257:262] == b"ustar":
        raise UnsupportedError(
            f"{source.path}: a tar file (torch before 0.1.10 wrote such): load it with torch and "
            "save it again"
        )
    for magic, what in _KNOWN_OTHERS:
        if start.startswith(magic):
            source.fail(f"this is {what}")
    if not any(start):
        source.fail("it starts with zeros only; the save or the copy did not finish")
    source.fail("not a file of torch.save (neither zip nor legacy stream)")


def _open_zip(source: FileSlice) -> TorchFile:
    directory = ZipDirectory(source)
    names = [n for n in directory.entries if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(names) != 1:
        source.fail("a zip file without data.pkl in its only folder: not written by torch.save")
    folder = names[0].removesuffix("data.pkl")
    if folder + "constants.pkl" in directory.entries:
        raise UnsupportedError(
            f"{source.path}: a TorchScript archive holds code; save the state_dict instead"
        )
    order = directory.entries.get(folder + "byteorder")
    byteorder = b"little" if order is None else directory.read(order, 64).strip()
    if byteorder not in (b"little", b"big"):
        source.fail(f"its byteorder entry says {byteorder[:20]!r}, not little or big")
    storages: dict[str, Storage] = {}
    big_endian = byteorder == b"big"

    def persistent_load(pid: object) -> object:
        dtype, key, count = parse_storage_id(pid, source)
        known = storages.get(key)
        if known is None:
            entry = directory.entries.get(f"{folder}data/{key}")
            if entry is None:
                source.fail(f"storage {key!r} is not in the archive")
            at = source.offset + directory.stored(entry)
            storages[key] = Storage(key, dtype, entry.size, at, source.path, big_endian)
        known = storages[key]
        if count * dtype.itemsize != known.nbytes:
            source.fail(
                f"storage {key!r} should have {count * dtype.itemsize} bytes ({count} x {dtype}), "
                f"the archive has {known.nbytes}"
            )
        if dtype != known.dtype:  # untyped storages are seen under several types
            return Storage(key, dtype, known.nbytes, known.offset, source.path, big_endian)
        return known

    data = directory.read(directory.entries[names[0]], _MAX_PICKLE)
    where = f"{source.path}: {names[0]}" + (f" at byte {source.offset}" if source.offset else "")
    root = loads(data, where=where, persistent_load=persistent_load)
    return TorchFile(source.path, root, "zip", big_endian, storages, folder.rstrip("/"))


def read_stored(tensor: StoredTensor) -> np.ndarray:
    """Read one tensor whole, as a contiguous array in native byte order (small tensors, scalars).

    Raises:
        FormatError: the file changed or became shorter since it was opened.
    """
    span = tensor.span * tensor.dtype.itemsize
    path = tensor.storage.path
    try:
        with open_file(path) as file:
            file.seek(tensor.file_offset)
            raw = bytearray(file.read(span))
    except OSError as e:
        raise FormatError(f"{path}: cannot be read: {e.strerror}") from None
    if len(raw) != span:
        raise FormatError(f"{path}: truncated while {span} bytes of a tensor were read")
    if not span:
        return np.empty(tensor.shape, tensor.dtype)
    item = tensor.dtype.itemsize
    if tensor.storage.big_endian and item > 1:
        part = item // 2 if tensor.dtype.kind == "c" else item  # complex: each half for itself
        np.frombuffer(raw, f"u{part}").byteswap(inplace=True)
    # np.lib.stride_tricks cannot handle every ml_dtypes type; the constructor can.
    steps = [s * item for s in tensor.strides]
    return np.array(np.ndarray(tensor.shape, tensor.dtype, raw, strides=steps), order="C")
