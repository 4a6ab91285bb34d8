"""A folder of a PyTorch distributed checkpoint: metadata, files and lazy tensors by flat key.

What ``torch.distributed.checkpoint`` writes and Megatron's ``torch_dist`` builds upon. Source:
``torch/distributed/checkpoint/filesystem.py``. Items are torch archives, or safetensors files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import FormatError
from .box import row_major
from .chunked import Chunk, Chunked
from .dcp_items import ItemSource, check_transforms, read_object
from .dcp_metadata import METADATA, ChunkEntry, Item, TensorEntry, check_files, read_dcp_metadata
from .safetensors_header import Header, read_header
from .source import FileSource, Source, open_file
from .state_tree import Deferred, KeyPath, guess_paths
from .tensor import LazyTensor

_SHARDING_INFO = "DCP_SHARDING_INFO"


class DcpFolder:
    """One folder with metadata: its tensors as chunk lists, its objects to be read later.

    Opening checks that every file is there, long enough, and ends with the promised tensor.

    Raises:
        FormatError: unfinished saves, missing, short or swapped files.
        UnsupportedError: transforms that cannot be undone here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / f"{METADATA}.tmp").exists() and (folder / METADATA).exists():
            raise FormatError(
                f"{folder}: a later save into this folder did not finish (.metadata.tmp beside "
                ".metadata), so its files are of two saves; take another checkpoint"
            )
        self.metadata = read_dcp_metadata(folder)
        sizes = check_files(self.metadata)
        self.files = {f: FileSource(folder / f, n) for f, n in sizes.items()}
        self.headers = self._check_contents()
        self.notes = self._strangers()

    def leaves(self) -> Iterable[tuple[KeyPath, object, str]]:
        """Yield (path in the state dict, lazy tensor or deferred object, flat key)."""
        paths = self.metadata.paths or guess_paths([*self.metadata.tensors, *self.metadata.objects])
        for key in self.metadata.tensors:
            yield paths.get(key, (key,)), self.tensor(key), key
        for key, item in self.metadata.objects.items():
            yield paths.get(key, (key,)), Deferred(self._reader(item)), key

    def _reader(self, item: Item) -> Callable[[], object]:
        return lambda: read_object(self.folder, item)

    def copies(self, key: str) -> tuple[LazyTensor, ...]:
        """Whole tensors made of what further ranks saved of the same chunks."""
        entry = self.metadata.tensors[key]
        by_box: dict[object, list[ChunkEntry]] = {}
        for c in entry.copies:
            by_box.setdefault(c.offsets, []).append(c)
        count = max(map(len, by_box.values()), default=0)
        rounds = (
            [by_box.get(c.offsets, [])[k : k + 1] or [c] for c in entry.chunks]
            for k in range(count)
        )
        return tuple(self._build(key, entry, [c for (c,) in chunks]) for chunks in rounds)

    def tensor(self, key: str) -> Chunked:
        """Return the lazy tensor of a flat key."""
        entry = self.metadata.tensors[key]
        return self._build(key, entry, entry.chunks)

    def _build(self, key: str, entry: TensorEntry, chunks: Iterable[ChunkEntry]) -> Chunked:
        itemsize = entry.dtype.itemsize
        pieces = []
        for c in chunks:
            if c.item is None or 0 in c.sizes:
                continue
            hi = tuple(a + n for a, n in zip(c.offsets, c.sizes, strict=True))
            source, at = self._source(key, entry, c, c.item)
            pieces.append(Chunk(c.offsets, hi, source, at, row_major(c.sizes, itemsize)))
        return Chunked(entry.shape, entry.dtype, pieces)

    def _source(
        self, key: str, entry: TensorEntry, chunk: ChunkEntry, item: Item
    ) -> tuple[Source, int]:
        header = self.headers.get(item.file)
        if header is None:
            source = ItemSource(self.files[item.file], item, key, chunk.sizes, entry.dtype)
            return source, item.offset
        found = header.tensors.get(key)
        if found is None or (found.shape, found.dtype) != (chunk.sizes, entry.dtype):
            raise FormatError(
                f"{self.folder / item.file}: does not hold {key!r} with shape {chunk.sizes} "
                f"{entry.dtype} as .metadata says; the file belongs to another rank or save"
            )
        offsets = _saved_offsets(header).get(key)
        if offsets is not None and offsets != chunk.offsets:
            raise FormatError(
                f"{self.folder / item.file}: {key!r} starts at {offsets} in the file's header, at "
                f"{chunk.offsets} in .metadata; the files come from different ranks or saves"
            )
        return self.files[item.file], found.start

    def _check_contents(self) -> dict[str, Header]:
        """Look into each file once: its kind, and whether its last tensor is the promised one."""
        last: dict[str, tuple[str, TensorEntry, ChunkEntry]] = {}
        for key, entry in self.metadata.tensors.items():
            for c in entry.chunks:
                if c.item is not None:
                    best = last.get(c.item.file)
                    if best is None or c.item.offset >= best[2].item.offset:  # type: ignore[union-attr]  # only chunks with items
                        last[c.item.file] = (key, entry, c)

        def look(file: str) -> Header | None:
            key, entry, chunk = last[file]
            item = chunk.item
            assert item is not None
            if item.transforms:
                check_transforms(self.folder / file, item)
                return None
            with open_file(self.folder / file) as f:
                start = f.read(9)
            if start[8:] == b"{" and not start.startswith(b"PK"):
                return read_header(self.folder / file)
            ItemSource(self.files[file], item, key, chunk.sizes, entry.dtype).locate(item.offset)
            return None

        with ThreadPoolExecutor(8) as pool:
            found = zip(last, pool.map(look, last), strict=True)
            return {file: header for file, header in found if header is not None}

    def _strangers(self) -> list[str]:
        known = set(self.metadata.files)
        extra = sorted(p.name for p in self.folder.glob("*.distcp") if p.name not in known)
        if not extra:
            return []
        return [
            f"{len(extra)} .distcp files are not part of the checkpoint (left over from an earlier "
            f"save with more ranks or threads): {', '.join(extra[:4])}"
        ]


def _saved_offsets(header: Header) -> Mapping[str, tuple[int, ...]]:
    """Return the offsets that ``DCP_SHARDING_INFO`` gives, where the header has it."""
    try:
        info = json.loads(header.metadata.get(_SHARDING_INFO, "{}"))
        return {k: tuple(v["saved_offsets"]) for k, v in info.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
