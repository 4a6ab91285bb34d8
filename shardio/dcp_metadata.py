"""The ``.metadata`` of a PyTorch distributed checkpoint (DCP), read without torch.

Source: ``torch/distributed/checkpoint/{metadata,filesystem,default_planner}.py`` (torch 2.0 to
2.13). The pickle holds, per flat key, either a tensor (shape, dtype, chunks with offsets and sizes)
or an opaque object, and for each chunk or object the file, offset and length of its item. Records
are recognised by their fields, not by class names, so writers that subclass them (Megatron
``torch_dist``, nvidia-resiliency-ext) read the same. Jobs that save without collectives leave one
``__<rank>.metadata`` per rank; these are united.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

import numpy as np

from ..errors import FormatError, UnsupportedError
from .box import Index
from .records import Record
from .source import open_file
from .unpickle import loads

METADATA = ".metadata"
_RANK_METADATA = re.compile(r"^__(\d+)\.metadata$")
_MAX_METADATA = 4 << 30
_FIELDS = ("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version")

KeyPath = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """Where one saved item lies: ``length`` bytes at ``offset`` of ``file`` (relative path).

    ``transforms`` names codecs that were applied to the bytes, such as ``stream.zstd/1``.
    """

    file: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """A box of a tensor (first index and size per dim) and its item; None only for empty boxes."""

    offsets: Index
    sizes: Index
    item: Item | None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor. ``copies``: further items for boxes in ``chunks`` (saves without collectives)."""

    shape: Index
    dtype: np.dtype
    chunks: tuple[ChunkEntry, ...]
    copies: tuple[ChunkEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """All that the metadata says.

    Attributes:
        folder: the checkpoint.
        version: of the metadata format, absent in older files.
        tensors: by flat key, in the order of the state dict (without planner data: as saved).
        objects: items of pickled objects (scalars, lists, RNG states...) by flat key.
        paths: planner data: flat key to its path in the nested state dict; keys without one are
            missing here.
        files: every file that an item names.
        extra: fields that other writers added (Megatron's ``mcore_data``), as plain data.
    """

    folder: Path
    version: str | None
    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, Item]
    paths: Mapping[str, KeyPath]
    files: tuple[str, ...]
    extra: Mapping[str, object]


def metadata_files(folder: Path) -> list[Path]:
    """Return ``.metadata``, or else the ``__<rank>.metadata`` files by rank; empty when neither."""
    if (folder / METADATA).is_file():
        return [folder / METADATA]
    try:
        ranked = [(int(m[1]), p) for p in folder.iterdir() if (m := _RANK_METADATA.match(p.name))]
    except OSError:
        return []
    return [p for _, p in sorted(ranked)]


def read_dcp_metadata(folder: Path) -> DcpMetadata:
    """Read the metadata of a checkpoint folder.

    Raises:
        FormatError: none there, an unfinished save, a truncated or lying file, paths that leave
            the folder.
        UnsupportedError: element types that mconv does not know.
    """
    files = metadata_files(folder)
    if not files:
        raise FormatError(f"{folder}: {_why_missing(folder)}")
    if files[0].name != METADATA:
        _check_ranks(files)
    parts = [_read_one(path, folder) for path in files]
    return parts[0] if len(parts) == 1 else _unite(folder, parts)


def _why_missing(folder: Path) -> str:
    try:
        names = [p.name for p in folder.iterdir()]
    except OSError as e:
        return f"cannot be listed ({e.strerror})"
    if any(n.endswith(".metadata.tmp") for n in names):
        return (
            "the save did not finish (.metadata.tmp is there, .metadata is not); take an earlier "
            "checkpoint"
        )
    if any(n.endswith(".distcp") for n in names):
        return (
            "there are .distcp files but no .metadata, without which they cannot be put together: "
            "the save did not finish, or the copy left hidden files out"
        )
    return "no .metadata: not a PyTorch distributed checkpoint"


def _check_ranks(files: list[Path]) -> None:
    ranks = [int(_RANK_METADATA.match(p.name)[1]) for p in files]  # type: ignore[index]  # filtered by this pattern
    missing = sorted(set(range(ranks[-1] + 1)) - set(ranks))
    if missing:
        raise FormatError(
            f"{files[0].parent}: metadata of ranks {_some(missing)} is missing (__<rank>.metadata, "
            f"the highest rank is {ranks[-1]})"
        )


def _read_one(path: Path, folder: Path) -> DcpMetadata:
    try:
        if path.stat().st_size > _MAX_METADATA:
            raise FormatError(f"{path}: {path.stat().st_size} bytes is too large for metadata")
        with open_file(path) as file:
            data = file.read()
    except OSError as e:
        raise FormatError(f"{path}: cannot be read ({e.strerror})") from None
    root = loads(data, where=str(path))
    if type(root) is not Record or "state_dict_metadata" not in root.fields:
        raise FormatError(f"{path}: holds no torch.distributed.checkpoint Metadata")
    return _Parser(path, folder).parse(root)


class _Parser:
    """Turns the unpickled records of one metadata file into entries, checking every number."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.files: dict[str, None] = {}
        self.items: dict[tuple[str, object], Item] = {}

    def fail(self, problem: str) -> NoReturn:
        raise FormatError(f"{self.path}: {problem}")

    def parse(self, root: Record) -> DcpMetadata:
        keys = root.fields["state_dict_metadata"]
        storage = root.fields.get("storage_data")
        if type(keys) is not dict or type(storage) is not dict:
            self.fail("state_dict_metadata or storage_data is not a dict: an unknown DCP writer")
        for index, info in storage.items():
            self._add_item(index, info)
        tensors: dict[str, TensorEntry] = {}
        objects: dict[str, Item] = {}
        for key, entry in keys.items():
            if type(key) is not str:
                self.fail(f"a key of the state dict is no text but {type(key).__name__}")
            if type(entry) is Record and "chunks" in entry.fields:
                tensors[key] = self._tensor(key, entry)
            elif (item := self.items.get((key, None))) is not None:
                objects[key] = item
            else:
                self.fail(f"object {key!r} has no item in storage_data")
        planner = root.fields.get("planner_data")
        paths = planner if type(planner) is dict else {}
        paths = {k: v for k, v in paths.items() if type(k) is str and _is_path(v)}
        # the plans of the ranks are joined, which loses the model's order; paths keep it
        place = {k: i for i, k in enumerate(paths)}
        tensors = {k: tensors[k] for k in sorted(tensors, key=lambda k: place.get(k, len(place)))}
        version = root.fields.get("version")
        return DcpMetadata(
            folder=self.folder,
            version=version if type(version) is str else None,
            tensors=tensors,
            objects=objects,
            paths=paths,
            files=tuple(self.files),
            extra={k: v for k, v in root.fields.items() if k not in _FIELDS},
        )

    def _add_item(self, index: object, info: object) -> None:
        if type(index) is not Record or type(info) is not Record:
            self.fail("storage_data has entries that are not MetadataIndex to _StorageInfo")
        fields, place = index.fields, info.fields
        name, offset = fields.get("fqn"), fields.get("offset")
        file, start, length = (place.get(k) for k in ("relative_path", "offset", "length"))
        if type(name) is not str or not (offset is None or type(offset) is tuple):
            self.fail("storage_data has an entry without a name or with a strange offset")
        if type(file) is not str or not _is_size(start) or not _is_size(length):
            self.fail(f"the item of {name!r} has no file, offset or length")
        if file not in self.files:
            if not _is_inside(file):
                self.fail(f"the item of {name!r} lies in {file!r}, outside the checkpoint folder")
            self.files[file] = None
        if (name, offset) in self.items:
            self.fail(f"{name!r} has two items for the chunk at {offset}")
        codecs = place.get("transform_descriptors") or ()
        if type(codecs) not in (list, tuple) or any(type(c) is not str for c in codecs):  # type: ignore[attr-defined]  # list or tuple
            self.fail(f"the item of {name!r} has transforms that are not names")
        self.items[name, offset] = Item(file, start, length, tuple(codecs))  # type: ignore[arg-type]  # checked by _is_size and above

    def _tensor(self, key: str, entry: Record) -> TensorEntry:
        shape, chunks = entry.fields.get("size"), entry.fields["chunks"]
        if not _are_sizes(shape) or type(chunks) is not list:
            self.fail(f"tensor {key!r} has no shape or no list of chunks")
        whole: Index = shape  # type: ignore[assignment]  # checked by _are_sizes
        dtype = _dtype(entry.fields.get("properties"))
        if dtype is None:
            raise UnsupportedError(f"{self.path}: tensor {key!r} has a dtype unknown to mconv")
        found = []
        seen = set()
        for chunk in chunks:
            fields = chunk.fields if type(chunk) is Record else {}
            lo, size = fields.get("offsets"), fields.get("sizes")
            if not _are_sizes(lo) or not _are_sizes(size) or not len(lo) == len(size) == len(whole):  # type: ignore[arg-type]  # tuples
                self.fail(f"tensor {key!r} has a chunk without offsets and sizes for {whole}")
            box: tuple[Index, Index] = lo, size  # type: ignore[assignment]  # checked by _are_sizes
            if box in seen:  # equal empty chunks of several ranks collapse into one item
                if 0 not in box[1]:
                    self.fail(f"tensor {key!r} has the chunk at {box[0]} twice")
                continue
            seen.add(box)
            if any(a + n > w for a, n, w in zip(*box, whole, strict=True)):
                self.fail(f"tensor {key!r}: chunk at {lo} of size {size} leaves its shape {whole}")
            item = self.items.get((key, lo))
            if item is None and 0 not in box[1]:
                self.fail(f"tensor {key!r}: no item in storage_data for the chunk at {lo}")
            found.append(ChunkEntry(*box, item))
        return TensorEntry(whole, dtype, tuple(found))


def _dtype(properties: object) -> np.dtype | None:
    """Return the element type of a TensorProperties (its state is a tuple, or a dict)."""
    if type(properties) is not Record:
        return None
    state = properties.state
    found = state[0] if type(state) is tuple and state else properties.fields.get("dtype")
    return found if isinstance(found, np.dtype) else None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_sizes(value: object) -> bool:
    return type(value) is tuple and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _is_path(value: object) -> bool:
    return type(value) is tuple and bool(value) and all(type(p) in (str, int) for p in value)


def _is_inside(file: str) -> bool:
    """Whether a relative path stays below its folder, on any system."""
    parts = PureWindowsPath(file).parts
    return bool(parts) and not (
        ".." in parts
        or PurePosixPath(file).is_absolute()
        or PureWindowsPath(file).anchor
        or "\0" in file
    )


def _unite(folder: Path, parts: list[DcpMetadata]) -> DcpMetadata:
    """Join the metadata of ranks that saved on their own.

    Chunks that several ranks saved (replicated tensors) become copies of the first one.
    """
    tensors: dict[str, TensorEntry] = {}
    objects: dict[str, Item] = {}
    paths: dict[str, KeyPath] = {}
    for part in parts:
        paths |= part.paths
        for key, item in part.objects.items():
            objects.setdefault(key, item)
        for key, entry in part.tensors.items():
            tensors[key] = _merge(folder, key, tensors[key], entry) if key in tensors else entry
    files = tuple(dict.fromkeys(f for part in parts for f in part.files))
    first = parts[0]
    return DcpMetadata(folder, first.version, tensors, objects, paths, files, first.extra)


def _merge(folder: Path, key: str, old: TensorEntry, new: TensorEntry) -> TensorEntry:
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise FormatError(
            f"{folder}: ranks disagree on {key!r}: {old.shape} {old.dtype} and {new.shape} "
            f"{new.dtype}; the files come from different saves"
        )
    known = {(c.offsets, c.sizes) for c in old.chunks}
    fresh = tuple(c for c in new.chunks if (c.offsets, c.sizes) not in known)
    again = tuple(c for c in new.chunks if (c.offsets, c.sizes) in known and c.item is not None)
    return TensorEntry(old.shape, old.dtype, old.chunks + fresh, old.copies + again)


def check_files(metadata: DcpMetadata) -> dict[str, int]:
    """Return the size in bytes of every file that items lie in, after checking all item ranges.

    Raises:
        FormatError: files are missing or shorter than their items.
    """
    sizes: dict[str, int] = {}
    missing = []
    for file in metadata.files:
        try:
            sizes[file] = (metadata.folder / file).stat().st_size
        except OSError:
            missing.append(file)
    if missing:
        raise FormatError(
            f"{metadata.folder}: {len(missing)} of {len(metadata.files)} files are missing: "
            f"{_some(sorted(missing))}; copy them from the ranks (nodes) that wrote them"
        )
    for key, item in all_items(metadata):
        if item.offset + item.length > sizes[item.file]:
            raise FormatError(
                f"{metadata.folder / item.file}: has {sizes[item.file]} bytes, the item of {key!r} "
                f"needs bytes {item.offset}..{item.offset + item.length}: the file is truncated, "
                "or belongs to another rank or another save"
            )
    return sizes


def all_items(metadata: DcpMetadata) -> Iterable[tuple[str, Item]]:
    """Yield (flat key, item) of all chunks, copies and objects."""
    for key, entry in metadata.tensors.items():
        for chunk in (*entry.chunks, *entry.copies):
            if chunk.item is not None:
                yield key, chunk.item
    yield from metadata.objects.items()


def _some(values: Iterable[object], limit: int = 8) -> str:
    shown = [str(v) for v in values]
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if shown[limit:] else "")
