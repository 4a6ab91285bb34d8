"""The legacy stream of ``torch.save`` (before 1.6, or ``_use_new_zipfile_serialization=False``).

After ``torch/serialization.py``: five pickles (magic number, protocol 1001, system info, the
object, the storage keys), then every storage in key order as an 8-byte element count and its raw
bytes. All positions follow from the object's pickle, so tensors stay where they are until they
are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .pickle_globals import storage_dtype
from .pickle_guard import TruncatedPickle
from .records import Global, Storage
from .torchzip import FileSlice
from .unpickle import load_prefix

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_MAGIC_BYTES = MAGIC.to_bytes(10, "little")
_WINDOW = 1 << 16
_MAX_WINDOW = 1 << 30

StorageId = tuple[np.dtype, str, int]


def is_legacy(start: bytes) -> bool:
    """Whether a file that starts with these (at least 32) bytes is a legacy stream."""
    return start[:1] == b"\x80" and _MAGIC_BYTES in start[:32]


def parse_storage_id(pid: object, source: FileSlice) -> StorageId:
    """Return (element type, key, element count) of ``('storage', class, key, device, count)``."""
    if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
        source.fail("the pickle refers to something that is not a storage")
    _, cls, key, _, count = pid[:5]
    dtype = storage_dtype(cls)
    if dtype is None:
        name = cls.name if type(cls) is Global else "unknown"
        source.fail(f"storage class {name!r} is not known")
    if type(key) is not str or type(count) is not int or not 0 <= count < 2**60 or len(key) > 200:
        source.fail("a storage has no usable key or size")
    return dtype, key, count


def read_legacy(source: FileSlice) -> tuple[object, dict[str, Storage], bool]:
    """Return (object, storages by key, big_endian).

    The object's pickle runs twice: once to learn the storages, whose positions follow after it, and
    once to build the tensors.

    Raises:
        FormatError: truncated or malformed stream, or a storage whose stored size differs.
    """
    at, head = 0, []
    for _ in range(3):
        value, at = _pickle(source, at, None)
        head.append(value)
    if head[0] != MAGIC or head[1] != PROTOCOL:
        source.fail("the legacy stream has another magic number or protocol")
    info = head[2]
    big_endian = type(info) is dict and info.get("little_endian") is False
    scan = _Scan(source, {})
    _, after = _pickle(source, at, scan.load)
    keys, data = _pickle(source, after, None)
    if type(keys) is not list or len(set(map(str, keys))) != len(keys):
        source.fail("the legacy stream has no list of storages")
    storages = _place(source, scan.found, keys, data, big_endian)
    views = _Views(source, storages)
    root, _ = _pickle(source, at, views.load)
    return root, storages, big_endian


@dataclass(slots=True)
class _Scan:
    """First pass: collects what storages there are; makes empty stand-ins."""

    source: FileSlice
    found: dict[str, StorageId]

    def load(self, pid: object) -> object:
        if _is_module(pid):
            return _module(pid)
        parsed = parse_storage_id(pid, self.source)
        dtype, key, count = parsed
        known = self.found.setdefault(key, parsed)
        if known[0].itemsize * known[2] != dtype.itemsize * count:
            self.source.fail(f"storage {key!r} is given two sizes")
        return Storage(key, dtype, 2**62, 0, self.source.path)


@dataclass(slots=True)
class _Views:
    """Second pass: hands out the placed storages, and views of them (torch before 0.4)."""

    source: FileSlice
    storages: dict[str, Storage]

    def load(self, pid: object) -> object:
        if _is_module(pid):
            return _module(pid)
        dtype, key, _ = parse_storage_id(pid, self.source)
        whole = self.storages.get(key)
        if whole is None:
            self.source.fail(f"storage {key!r} is used but not in the stream")
        start, size, name = 0, whole.nbytes, key
        view = pid[5] if type(pid) is tuple and len(pid) > 5 else None
        if view is not None:
            if type(view) is not tuple or len(view) != 3:
                self.source.fail(f"storage {key!r} has a malformed view")
            if any(type(n) is not int or not 0 <= n < 2**60 for n in view[1:]):
                self.source.fail(f"storage {key!r} has a malformed view")
            start, size = view[1] * dtype.itemsize, view[2] * dtype.itemsize
            name = str(view[0])[:200] if type(view[0]) in (str, int) else key
        elif dtype == whole.dtype:
            return whole
        if start + size > whole.nbytes:
            self.source.fail(
                f"a view of storage {key!r} ends at byte {start + size} of {whole.nbytes}"
            )
        at = whole.offset + start
        return Storage(name, dtype, size, at, whole.path, whole.big_endian)


def _is_module(pid: object) -> bool:
    return type(pid) is tuple and len(pid) >= 2 and pid[0] == "module"


def _module(pid: object) -> object:
    """Whole pickled modules come with their source text; only the class name is used."""
    return pid[1] if type(pid) is tuple else None


def _place(
    source: FileSlice, found: dict[str, StorageId], keys: list[object], at: int, big_endian: bool
) -> dict[str, Storage]:
    """Follow the storages through the stream, checking each one's element count."""
    storages: dict[str, Storage] = {}
    for key in keys:
        parsed = found.get(key) if type(key) is str else None
        if parsed is None or type(key) is not str:
            source.fail("the legacy stream lists a storage that the object does not use")
        dtype, _, count = parsed
        stated = int.from_bytes(source.read(at, 8), "big" if big_endian else "little")
        if stated != count:
            source.fail(f"storage {key!r} should have {count} elements, the stream says {stated}")
        nbytes = count * dtype.itemsize
        if at + 8 + nbytes > source.length:
            source.fail(
                f"truncated: storage {key!r} needs {nbytes} bytes at {at + 8}, the file has "
                f"{source.length}"
            )
        place = source.offset + at + 8
        storages[key] = Storage(key, dtype, nbytes, place, source.path, big_endian)
        at += 8 + nbytes
    return storages


def _pickle(
    source: FileSlice, at: int, persistent_load: Callable[[object], object] | None
) -> tuple[object, int]:
    """Run the pickle at ``at``; return its object and the position behind it.

    Its length is not stated anywhere, so it is tried on growing windows.
    """
    window = _WINDOW
    while True:
        count = min(window, source.length - at)
        where = f"{source.path}: legacy pickle at byte {source.offset + at}"
        data = source.read(at, count)
        try:
            value, used = load_prefix(data, where=where, persistent_load=persistent_load)
        except TruncatedPickle:
            if count < window or window >= _MAX_WINDOW:
                raise
            window *= 8
        else:
            return value, at + used
