"""Changing the header of a GGUF file where it lies, so that a crash can always be undone.

Tensor offsets count from the aligned end of the header, so a new header fits when it pads to the
same length. The old one is saved and synced beside the file first (``.NAME.mconv-undo``); only then
is the file touched, and the copy goes away when the new header is on the disk. A copy that is found
later means that an edit was interrupted: ``repair`` puts the old header back.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from ...errors import FormatError, OutputError
from .reader import GgufFile
from .values import KeyValue
from .writer import TensorSpec, build_header

_MAGIC = b"MCONVUNDO1"
_HEAD = struct.Struct("<QQ32s32s")  # file size, header length, digests of old and new header


def undo_path(path: Path) -> Path:
    """Return where the old header of a file is kept during an edit."""
    return path.parent / f".{path.name}.mconv-undo"


def data_start(file: GgufFile) -> int:
    """Return where the tensor data of a (single) file begin: the length of its padded header."""
    starts = [info.offset for info in file.tensors.values()]
    return min(starts) if starts else file.paths[0].stat().st_size


def new_header(file: GgufFile, entries: Sequence[KeyValue]) -> bytes:
    """Return the header of a (single) file with other metadata.

    Raises:
        FormatError: metadata that GGUF cannot hold.
    """
    specs = [
        TensorSpec(info.name, info.shape, info.type.id, info.nbytes)
        for info in file.tensors.values()
    ]
    header = build_header(entries, specs, alignment=file.alignment, big_endian=file.big_endian)
    return header.data


def fits(file: GgufFile, header: bytes) -> bool:
    """Return whether a header can take the place of the file's own.

    The tensors must lie in the order of their infos without gaps, as they do in files of all known
    writers: that is what a built header says of them.
    """
    position, start = data_start(file), data_start(file)
    for info in file.tensors.values():
        if info.offset != position:
            return False
        position += -(-info.nbytes // file.alignment) * file.alignment
    return bool(file.tensors) and len(header) == start


def write_header(path: Path, header: bytes) -> None:
    """Replace the first bytes of a file, undoably.

    Raises:
        OutputError: the disk refuses, or an interrupted edit waits to be repaired.
    """
    undo = undo_path(path)
    if undo.exists():
        raise OutputError(
            f"{path}: an earlier edit was interrupted; run `mconv gguf repair {path}` first"
        )
    try:
        with path.open("r+b") as file:
            old = file.read(len(header))
            size = os.fstat(file.fileno()).st_size
            head = _HEAD.pack(size, len(header), _digest(old), _digest(header))
            _save(undo, _MAGIC + head + old)
            file.seek(0)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        undo.unlink()
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be changed: {error.strerror}") from error


def repair(path: Path) -> str:
    """Finish or undo an interrupted edit; return what was done, empty for nothing to do.

    Raises:
        FormatError: the saved header does not belong to the file.
        OutputError: the disk refuses.
    """
    undo = undo_path(path)
    if not undo.exists():
        return ""
    try:
        raw = undo.read_bytes()
        begin = len(_MAGIC) + _HEAD.size
        if not raw.startswith(_MAGIC) or len(raw) < begin:
            # the copy was not complete, so the file was not touched yet
            undo.unlink()
            return "the edit had not begun; the file is as it was"
        size, length, before, after = _HEAD.unpack(raw[len(_MAGIC) : begin])
        old = raw[begin:]
        if len(old) != length or _digest(old) != before:
            undo.unlink()
            return "the edit had not begun; the file is as it was"
        with path.open("r+b") as file:
            if os.fstat(file.fileno()).st_size != size:
                raise FormatError(
                    f"{undo}: belongs to a file of {size} bytes, {path.name} has another size: it "
                    "was replaced since; delete the saved header if the file is right"
                )
            now = _digest(file.read(length))
            if now not in (before, after):
                file.seek(0)
                file.write(old)
                file.flush()
                os.fsync(file.fileno())
        undo.unlink()
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be repaired: {error.strerror}") from error
    if now == after:
        return "the edit was complete; kept"
    return "the edit was undone; the file is as it was"


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _save(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
