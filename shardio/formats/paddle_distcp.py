"""Paddle's distributed checkpoints: ``<n>.metadata`` and ``<rank>_<n>.distcp``, both pickles.

The metadata lists the pieces of every tensor (offset, shape) and the file of each; a file is a
dict of numpy arrays by the same keys. Not to be confused with torch's DCP, whose files end alike.
Source: Paddle ``python/paddle/distributed/checkpoint`` (metadata.py, save_state_dict.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FormatError, UnsupportedError
from ..box import Index
from ..checkpoint import Checkpoint
from ..chunked import Chunk, Chunked
from ..coverage import prove
from ..layout import Layout
from ..paddle_files import PaddleFile, optimizer_states, read_paddle
from ..pickle_file import open_pickle
from ..placement import Placement, Shard
from ..records import Record
from ..registry import Format, OpenOptions
from ..state_checkpoint import model_files
from ..tensor import LazyTensor

_METADATA = re.compile(r"^(\d+)\.metadata$")
_FILE = re.compile(r"^\d+_\d+\.distcp$")
_ROOTS = ("model", "optimizer", "opt", "master_weights")


def detect(path: Path) -> Path | None:
    """Return the folder of a metadata or rank file, or the folder itself."""
    folder = path.parent if path.is_file() else path
    if path.is_file() and not (_METADATA.match(path.name) or _FILE.match(path.name)):
        return None
    try:
        return folder if _metadata_files(folder) else None
    except OSError:
        return None


def _metadata_files(folder: Path) -> list[Path]:
    return sorted(
        (p for p in folder.glob("*.metadata") if _METADATA.match(p.name)),
        key=lambda p: int(p.name.partition(".")[0]),
    )


def open_distcp(root: Path, options: OpenOptions) -> Checkpoint:
    """Open the folder's last save.

    Raises:
        FormatError: missing or damaged files, pieces that leave holes or are not where the metadata
            says.
        UnsupportedError: flattened pieces (sharding with tensor fusion).
    """
    meta = _metadata_files(root)[-1]
    record = open_pickle(meta)
    pieces, places = _field(record, "state_dict_metadata"), _field(record, "storage_metadata")
    if pieces is None or places is None:
        raise FormatError(f"{meta}: is not the metadata of a Paddle distributed checkpoint")
    paths = _field(record, "flat_mapping") or {}
    files = _open_files(meta, sorted({str(f) for f in places.values()}))
    where = _where(meta, places)
    whole = {str(k): _assemble(meta, str(k), parts, where, files) for k, parts in pieces.items()}
    own = {a: n for f in files.values() for n, a in f.parameters.items()}
    weights, states = _sorted_out(whole, {str(k): v for k, v in paths.items()}, own)
    if not weights:
        raise FormatError(f"{root}: holds no tensors that could be model weights")
    prove(weights, root)
    for state, tensors in states.items():
        prove(tensors, f"{root}: optimizer state {state}")
    config, assets = model_files(root, options)
    return Checkpoint(
        path=root,
        format="paddle-distcp",
        weights=weights,
        optimizer=states,
        config=config,
        layout=Layout(format="paddle-distcp", dp=len(files)),
        placements={n: p for n, t in weights.items() if (p := _placement(t))},
        assets=assets,
    )


def _field(record: object, name: str) -> dict[Any, Any] | None:
    value = record.get(name) if isinstance(record, Record) else None
    return value if isinstance(value, dict) else None


def _open_files(meta: Path, names: list[str]) -> dict[str, PaddleFile]:
    wrong = [n for n in names if not _FILE.match(n)]
    missing = [n for n in names if not (meta.parent / n).is_file()]
    if wrong or missing:
        raise FormatError(
            f"{meta}: {len(wrong or missing)} of {len(names)} files are "
            f"{'misnamed' if wrong else 'missing'}: {', '.join((wrong or missing)[:8])}"
        )
    return {n: read_paddle(meta.parent / n) for n in names}


def _where(meta: Path, places: Mapping[object, object]) -> dict[tuple[str, Index], str]:
    """Return the file of each (tensor, offset)."""
    found = {}
    for index, file in places.items():
        fields = index.fields if isinstance(index, Record) else {}
        if fields.get("is_flattened"):
            raise UnsupportedError(
                f"{meta}: {fields.get('tensor_key')!r} is flattened (sharding with tensor fusion); "
                "save without it"
            )
        found[str(fields.get("tensor_key")), _sizes(meta, fields.get("global_offset"))] = str(file)
    return found


def _assemble(
    meta: Path,
    key: str,
    parts: object,
    where: Mapping[tuple[str, Index], str],
    files: Mapping[str, PaddleFile],
) -> Chunked:
    """Put a tensor together of its pieces."""
    chunks: list[Chunk] = []
    shape: Index | None = None
    dtype: np.dtype | None = None
    for part in parts if isinstance(parts, list) else ():
        fields = part.fields if isinstance(part, Record) else {}
        offset = _sizes(meta, fields.get("global_offset"))
        local = _sizes(meta, fields.get("local_shape"))
        piece = files[where[key, offset]].tensors.get((key,)) if (key, offset) in where else None
        if piece is None or len(offset) != len(local):
            raise FormatError(f"{meta}: the piece of {key!r} at {list(offset)} is in no file")
        if piece.shape != local or (dtype is not None and piece.dtype != dtype):
            raise FormatError(
                f"{files[where[key, offset]].path}: {key!r} is {list(piece.shape)} of "
                f"{piece.dtype}, the metadata says {list(local)} at {list(offset)}: files of "
                "different saves were mixed"
            )
        end = tuple(o + n for o, n in zip(offset, local, strict=True))
        if shape is not None and len(shape) != len(end):
            raise FormatError(f"{meta}: the pieces of {key!r} differ in their number of dims")
        shape = end if shape is None else tuple(map(max, shape, end))
        dtype = piece.dtype
        if not isinstance(piece, Chunked):
            raise UnsupportedError(f"{meta}: {key!r} is stored big-endian")
        chunks += [c.moved(offset) for c in piece.chunks]
    if shape is None or dtype is None:
        raise FormatError(f"{meta}: {key!r} has no pieces")
    return Chunked(shape, dtype, chunks)


def _sizes(meta: Path, value: object) -> Index:
    if type(value) not in (tuple, list) or any(type(n) is not int or n < 0 for n in value):  # type: ignore[attr-defined]  # a sequence, narrowed by the line above
        raise FormatError(f"{meta}: an offset or shape is no tuple of sizes")
    return tuple(value)  # type: ignore[arg-type]  # as above


def _sorted_out(
    tensors: Mapping[str, LazyTensor], paths: Mapping[str, object], own: Mapping[str, str]
) -> tuple[dict[str, LazyTensor], dict[str, dict[str, LazyTensor]]]:
    """Return the weights, and the optimizer's states by kind and weight."""
    keyed = dict(_keyed(tensors, paths))
    models = {k: t for k, t in keyed.items() if len(k) == 1 or k[0] == "model"}
    weights = {k[-1]: t for k, t in models.items()}
    known = {**{o: _last(n, weights) for o, n in own.items()}, **{n: n for n in weights}}
    states: dict[str, dict[str, LazyTensor]] = {}
    rest = {k: t for k, t in keyed.items() if k not in models}
    for kind, owner, tensor in optimizer_states(rest, lambda n: known.get(n)):
        states.setdefault(kind, {})[owner] = tensor
    return weights, states


def _keyed(
    tensors: Mapping[str, LazyTensor], paths: Mapping[str, object]
) -> Iterator[tuple[tuple[str, ...], LazyTensor]]:
    for key, tensor in tensors.items():
        path = paths.get(key, (key,))
        names = tuple(map(str, path)) if isinstance(path, tuple) and path else (key,)
        # everything below the usual roots is one name
        yield (names if names[0] in _ROOTS else (".".join(names),)), tensor


def _last(name: str, weights: Mapping[str, LazyTensor]) -> str | None:
    short = name.partition(".")[2] if name.partition(".")[0] in _ROOTS else name
    return short if short in weights else None


def _placement(tensor: LazyTensor) -> dict[str, Placement]:
    assert isinstance(tensor, Chunked), "made by _assemble"
    starts = [c.lo for c in tensor.chunks]
    cut = [d for d in range(tensor.ndim) if len({s[d] for s in starts}) > 1]
    return {f"mesh{d}" if len(cut) > 1 else "mesh": Shard(d) for d in cut}


FORMAT = Format(
    "paddle-distcp", "PaddlePaddle distributed checkpoint", detect, open_distcp, rank=40
)
