"""PyTorch distributed checkpoints (DCP): FSDP2, TP, FSDP x TP, HSDP, pipeline stages.

``.metadata`` and ``__<rank>_<n>.distcp`` files, or one ``__<rank>.metadata`` per rank; accelerate's
pair of folders ``pytorch_model_fsdp_<i>`` and ``optimizer_<i>``; items as torch archives,
compressed by the zstd extension, or whole files in safetensors format. Source:
``torch/distributed/checkpoint/{filesystem,default_planner,_extension}.py`` (torch 2.0 to 2.13).
Coverage is proven from the metadata at open; items are located at their first read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...errors import FormatError
from ..box import row_major
from ..checkpoint import Checkpoint
from ..chunked import Chunk, Chunked
from ..coverage import prove
from ..dcp_items import ItemSource, check_transforms, read_object
from ..dcp_metadata import (
    METADATA,
    ChunkEntry,
    DcpMetadata,
    Item,
    TensorEntry,
    check_files,
    metadata_files,
    read_dcp_metadata,
)
from ..layout import Layout
from ..placement import Placement, Shard
from ..registry import Format, OpenOptions
from ..safetensors_header import Header, read_header
from ..source import FileSource, Source
from ..state_checkpoint import build_checkpoint
from ..state_tree import OPTIMIZER_ROOTS, Deferred, KeyPath, examine, guess_paths, nest
from ..tensor import LazyTensor

_MODEL_FOLDER = re.compile(r"^pytorch_model_fsdp_(\d+)$")
_RANK_FILE = re.compile(r"^__(\d+)_\d+\.distcp$")
_SHARDING_INFO = "DCP_SHARDING_INFO"


def detect(path: Path) -> Path | None:
    """Return the folder with the metadata (of the model, where the optimizer has its own)."""
    if path.is_file():
        return path.parent if path.suffix == ".distcp" or path.name == METADATA else None
    model = path / "pytorch_model_fsdp_0"
    if _has_metadata(model):
        return model
    beside = path.parent / path.name.replace("optimizer_", "pytorch_model_fsdp_")
    if path.name.startswith("optimizer_") and _has_metadata(beside):
        return beside
    return path if _has_metadata(path) else None


def _has_metadata(folder: Path) -> bool:
    """Whether this is a DCP folder, finished or not."""
    if not folder.is_dir():
        return False
    return bool(metadata_files(folder)) or any(
        _RANK_FILE.match(p.name) for p in folder.glob("__*.distcp")
    )


def open_dcp(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a checkpoint folder.

    Raises:
        FormatError: unfinished saves, missing or short files, holes, overlaps, swapped files.
        UnsupportedError: transforms other than zstd, or zstd without its package.
    """
    parts = [_Part(root)]
    match = _MODEL_FOLDER.match(root.name)
    if match and _has_metadata(root.parent / f"optimizer_{match[1]}"):
        parts.append(_Part(root.parent / f"optimizer_{match[1]}"))
    flat: dict[KeyPath, object] = {}
    keys: dict[int, tuple[_Part, str]] = {}
    for k, part in enumerate(parts):
        for path, value, key in part.leaves():
            place = path if k == 0 or str(path[0]) in OPTIMIZER_ROOTS else ("optimizer", *path)
            flat[place] = value
            keys[id(value)] = (part, key)
    tree = examine(nest(flat))
    origin = {n: keys[id(t)] for n, t in tree.weights.items()}
    entries = {n: part.metadata.tensors[key] for n, (part, key) in origin.items()}
    checkpoint = build_checkpoint(
        root,
        "dcp",
        tree,
        options,
        version=parts[0].metadata.version,
        layout=_layout(parts[0].metadata, entries.values()),
        placements={n: p for n, e in entries.items() if (p := _placement(e))},
        replicas={n: part.copies(key) for n, (part, key) in origin.items()},
        warnings=[note for part in parts for note in part.notes],
    )
    prove(checkpoint.weights, root)
    for state, tensors in checkpoint.optimizer.items():
        prove(tensors, f"{root}: optimizer state {state}")
    return checkpoint


class _Part:
    """One folder with metadata: its tensors as chunk lists, its objects to be read later."""

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
        for key, entry in self.metadata.tensors.items():
            yield paths.get(key, (key,)), self._tensor(key, entry, entry.chunks), key
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
        return tuple(self._tensor(key, entry, [c for (c,) in chunks]) for chunks in rounds)

    def _tensor(self, key: str, entry: TensorEntry, chunks: Iterable[ChunkEntry]) -> Chunked:
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
            with (self.folder / file).open("rb") as f:
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


def _layout(metadata: DcpMetadata, entries: Iterable[TensorEntry]) -> Layout:
    """Guess the mesh from the chunk grids: cuts along dim 1 are tensor parallel."""
    tp = total = 1
    for entry in entries:
        cuts = [len({c.offsets[d] for c in entry.chunks}) for d in range(len(entry.shape))]
        tp = max(tp, *cuts[1:]) if len(cuts) > 1 else tp
        total = max(total, len(entry.chunks))
    return Layout(format="dcp", tp=tp, dp=total // tp if total % tp == 0 else total)


def _placement(entry: TensorEntry) -> dict[str, Placement]:
    cut = [d for d in range(len(entry.shape)) if len({c.offsets[d] for c in entry.chunks}) > 1]
    if len(cut) == 1:
        return {"mesh": Shard(cut[0])}
    return {f"mesh{d}": Shard(d) for d in cut}


FORMAT = Format("dcp", "PyTorch distributed checkpoint (DCP)", detect, open_dcp, rank=60)
