"""PyTorch DCP in Hugging Face form: ``shard-<rank>-model-<file>-of-<n>.safetensors``.

Written by ``HuggingFaceStorageWriter(save_distributed=True)``; source:
``torch/distributed/checkpoint/{hf_storage,_hf_utils}.py``. Each file is safetensors whose metadata
``DCP_SHARDING_INFO`` gives the offsets of its pieces. Nothing gives the whole shapes: they are the
furthest ends, so a last rank that is missing shows only against the model's config. With
consolidation the pieces lie in ``sharded/`` and the folder itself is read as plain Hugging Face.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ..box import Index, row_major
from ..checkpoint import Checkpoint
from ..chunk_union import unite
from ..chunked import Chunk, Chunked
from ..coverage import prove
from ..layout import Layout
from ..placement import Placement, Shard
from ..registry import Format, OpenOptions
from ..safetensors_header import Entry, Header, read_header
from ..source import FileSource
from ..state_checkpoint import build_checkpoint
from ..state_tree import examine, guess_paths, nest
from ..tensor import LazyTensor
from ..training_file import read_training_file

_PIECE = re.compile(r"^shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors$")
_SHARDING_INFO = "DCP_SHARDING_INFO"
_THREADS = 8


def detect(path: Path) -> Path | None:
    """Return the folder with the pieces, unless its consolidation is complete."""
    if path.is_file():
        return path.parent if _PIECE.match(path.name) else None
    if any(_PIECE.match(p.name) for p in path.glob("shard-*.safetensors")):
        return path
    pieces = path / "sharded"
    finished = (path / "model.safetensors.index.json").exists()
    return None if finished or not pieces.is_dir() else detect(pieces)


def open_hf_dcp(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a folder of pieces.

    Raises:
        FormatError: missing ranks or files, holes, overlaps, pieces that contradict each other or
            the config.
    """
    files = _files(root)
    with ThreadPoolExecutor(_THREADS) as pool:
        headers = dict(zip(files, pool.map(read_header, files), strict=True))
    pieces: dict[str, list[_Piece]] = {}
    for path, header in headers.items():
        for piece in _pieces(path, header):
            pieces.setdefault(piece.name, []).append(piece)
    joined = {name: _join(name, parts) for name, parts in pieces.items()}
    tensors = {name: whole for name, (whole, _) in joined.items()}
    paths = guess_paths(tensors)
    tree = examine(nest({paths[n]: t for n, t in tensors.items()}))
    origin = {id(t): n for n, t in tensors.items()}
    keys = {name: origin[id(t)] for name, t in tree.weights.items()}
    checkpoint = build_checkpoint(
        root,
        "hf_dcp",
        tree,
        options,
        version=next(iter(headers.values())).metadata.get("DCP_VERSION"),
        layout=_layout(tensors.values()),
        placements={n: p for n, key in keys.items() if (p := _placement(tensors[key]))},
        replicas={n: joined[key][1] for n, key in keys.items()},
        warnings=_doubts(root, files),
    )
    prove(checkpoint.weights, root)
    for state, states in checkpoint.optimizer.items():
        prove(states, f"{root}: optimizer state {state}")
    _check_config(root, checkpoint.weights, checkpoint.config)
    step, scalars, args = read_training_file(root)
    if scalars or step is not None:
        checkpoint = replace(checkpoint, step=step, scalars=scalars, args=args)
    return checkpoint


def _files(root: Path) -> list[Path]:
    """Return all pieces by (file number, rank) after checking that no rank is missing."""
    found: dict[tuple[int, int], Path] = {}
    totals = set()
    for path in root.iterdir():
        if m := _PIECE.match(path.name):
            rank, number, total = int(m[1]), int(m[2]), int(m[3])
            totals.add(total)
            found[number, rank] = path
    if len(totals) != 1:
        raise FormatError(
            f"{root}: pieces of several saves are mixed: -of-{', -of-'.join(map(str, totals))}"
        )
    ranks = {rank for _, rank in found}
    numbers = {number for number, _ in found}
    lost = [f"shard-{r:05d}-*" for r in range(1, max(ranks)) if r not in ranks]
    lost += [f"*-model-{n:05d}-of-*" for n in range(1, min(totals) + 1) if n not in numbers]
    if lost:
        raise FormatError(f"{root}: files are missing: {', '.join(lost[:8])}")
    return [found[key] for key in sorted(found)]


def _doubts(root: Path, files: list[Path]) -> list[str]:
    """Say which rank has fewer files than others, which is right only for empty shards."""
    ranks = [int(m[1]) for p in files if (m := _PIECE.match(p.name))]
    counts = {r: ranks.count(r) for r in set(ranks)}
    few = sorted(r for r, n in counts.items() if n < max(counts.values()))
    if not few:
        return []
    listed = ", ".join(f"shard-{r:05d}" for r in few[:4])
    return [
        f"{listed} has fewer files than other ranks; without a config a lost end is not noticed"
    ]


class _Piece:
    """A tensor of one file and its place in the whole."""

    __slots__ = ("entry", "hi", "lo", "name", "source")

    def __init__(self, name: str, lo: Index, entry: Entry, source: FileSource) -> None:
        self.name, self.lo, self.entry, self.source = name, lo, entry, source
        self.hi = tuple(a + n for a, n in zip(lo, entry.shape, strict=True))

    def chunk(self) -> Chunk:
        strides = row_major(self.entry.shape, self.entry.dtype.itemsize)
        return Chunk(self.lo, self.hi, self.source, self.entry.start, strides)


def _pieces(path: Path, header: Header) -> Iterable[_Piece]:
    text = header.metadata.get(_SHARDING_INFO)
    if text is None:
        raise FormatError(
            f"{path}: has no {_SHARDING_INFO}, so where its tensors belong is unknown"
        )
    try:
        info = json.loads(text)
        places = {name: info[name]["saved_offsets"] for name in header.tensors}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FormatError(f"{path}: {_SHARDING_INFO} lacks tensors or is malformed") from None
    source = FileSource(path, header.file_size)
    for name, entry in header.tensors.items():
        place = places[name]
        if (
            not isinstance(place, list)
            or len(place) != len(entry.shape)
            or any(type(n) is not int or not 0 <= n < 2**62 for n in place)
        ):
            raise FormatError(f"{path}: {name!r} has offsets that do not fit {entry.shape}")
        yield _Piece(name, tuple(place), entry, source)


def _join(name: str, parts: list[_Piece]) -> tuple[Chunked, tuple[Chunked, ...]]:
    """Return the tensor, and copies where several ranks saved the same pieces."""
    first = parts[0]
    for p in parts:
        if p.entry.dtype != first.entry.dtype or len(p.lo) != len(first.lo):
            raise FormatError(
                f"{p.source.path}: {name!r} is {p.entry.dtype} with {len(p.lo)} dims, in "
                f"{first.source.path} {first.entry.dtype} with {len(first.lo)}"
            )
    shape = tuple(max(p.hi[d] for p in parts) for d in range(len(first.lo)))
    chunks = [p.chunk() for p in parts if 0 not in p.entry.shape]
    return unite(shape, first.entry.dtype, chunks)


def _layout(tensors: Iterable[Chunked]) -> Layout:
    return Layout(format="hf_dcp", dp=max((len(t.chunks) for t in tensors), default=1) or 1)


def _placement(tensor: Chunked) -> dict[str, Placement]:
    cut = [d for d in range(tensor.ndim) if len({c.lo[d] for c in tensor.chunks}) > 1]
    return {f"mesh{d}" if len(cut) > 1 else "mesh": Shard(d) for d in cut}


def _check_config(
    root: Path, weights: Mapping[str, LazyTensor], config: Mapping[str, Any] | None
) -> None:
    """Demand the sizes that the config promises: a missing last rank makes tensors shorter."""
    if config is None:
        return
    expected = {
        "embed_tokens.weight": ("vocab_size", "hidden_size"),
        "lm_head.weight": ("vocab_size", "hidden_size"),
        "layernorm.weight": ("hidden_size",),
        "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
        "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
        "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
        "o_proj.weight": ("hidden_size",),
    }
    for name, tensor in weights.items():
        for suffix, keys in expected.items():
            if not name.endswith(suffix):
                continue
            for size, key in zip(tensor.shape, keys, strict=False):
                wanted = config.get(key)
                if type(wanted) is int and size < wanted:
                    raise FormatError(
                        f"{root}: {name!r} has shape {tensor.shape}, but {key} is {wanted} in the "
                        "config: pieces of the last ranks are missing"
                    )


FORMAT = Format("hf_dcp", "PyTorch DCP in Hugging Face form", detect, open_hf_dcp, rank=50)
