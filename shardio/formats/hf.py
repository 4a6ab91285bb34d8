"""Hugging Face checkpoints: safetensors or ``.bin``, single or sharded, with variants.

Source: transformers ``modeling_utils``, huggingface_hub ``split_torch_state_dict_into_shards``, and
the safetensors format page. The index decides which file holds a tensor, the headers what is really
there; where they disagree the checkpoint is refused, because shard files were swapped or mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FormatError, UnsupportedError, counted
from ..assets import load_json
from ..checkpoint import Checkpoint
from ..chunked import Chunked
from ..hf_files import FileSet, choose, file_sets, read_index, set_of, shard_files, stale_files
from ..layout import Layout
from ..names import stripped
from ..records import StoredTensor, exotic_kind
from ..registry import Format, OpenOptions
from ..safetensors_header import Entry, read_header
from ..source import FileSource, read_small
from ..state_checkpoint import as_lazy, model_files, shared_storages, tie_by_config
from ..state_tree import Leaf, examine
from ..tensor import LazyTensor
from ..torchfile import open_torch_file
from ..trainer_optimizer import read_trainer_optimizer
from ..training_file import read_training_file

_THREADS = 8
_PACKED = "float4_e2m1fn"


def detect(path: Path) -> Path | None:
    """Return the folder, or the file or index itself where that is what is meant."""
    if path.is_file():
        files = set_of(path)
        if files is None:
            return None
        clear = files.single is None or not (files.index or files.shards)
        return path.parent if files.usual and clear else path
    sets = file_sets(path)
    if not sets or (not sets[0].index and _has_pieces(path / "sharded")):
        return None  # consolidation did not finish; the pieces are complete
    return path


def _has_pieces(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("shard-*-model-*.safetensors"))


def open_hf(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a folder, a file or an index.

    Raises:
        FormatError: missing shards, damaged files, an index that contradicts the files, tensors in
            two files without an index.
        UnsupportedError: element types or torch tensors that mconv does not know.
    """
    notes: list[str] = []
    if root.is_file():
        files = set_of(root)
        assert files is not None, "detect returns files of a set only"
        folder = root.parent
    else:
        folder, files = root, choose(root, file_sets(root))
        others = [s for s in file_sets(root) if s is not files and s.stem != files.stem]
        notes += [f"{s.stem}.{s.kind} is here too and not read" for s in others if s.variant]
    index, paths = _parts(folder, root, files, notes)
    tables = _load(paths)
    leaves, replicas = _select(folder, index, tables, notes)
    names = stripped(leaves)
    weights = {names[n]: t for n, t in leaves.items()}
    config, assets = model_files(root, options)
    tied = shared_storages(weights)
    lazies, tied, copies = tie_by_config(
        {n: as_lazy(t) for n, t in weights.items() if n not in tied},
        config,
        tied,
        {names[n]: c for n, c in replicas.items()},
    )
    scalars: Mapping[str, Any]
    step, scalars, args = read_training_file(folder)
    step = step if step is not None else trainer_step(folder)
    states: Mapping[str, Mapping[str, LazyTensor]] = _optimizer(folder, lazies, notes)
    if not states:
        in_order = files.kind == "bin"
        states, found = read_trainer_optimizer(folder, lazies, tied, in_order, step, notes)
        scalars = scalars or found
    return Checkpoint(
        path=root,
        format="hf",
        version=_version(config),
        weights=lazies,
        optimizer=states,
        step=step,
        scalars=scalars,
        config=config,
        args=_params(folder) if files.stem.startswith("consolidated") else args,
        layout=Layout(format="hf"),
        replicas=copies,
        tied=tied,
        assets=assets,
        warnings=tuple(notes),
    )


def _params(folder: Path) -> Mapping[str, Any]:
    """Return the ``params.json`` that lies beside Mistral's own ``consolidated.safetensors``."""
    path = folder / "params.json"
    params = load_json(path) if path.is_file() else {}
    return params if isinstance(params, dict) else {}


def _parts(
    folder: Path, root: Path, files: FileSet, notes: list[str]
) -> tuple[dict[str, str] | None, dict[str, Path]]:
    """Return (index, files to load): the single file first, as transformers does."""
    if files.single is not None and root in (folder, files.single):
        if files.index is not None or files.shards:
            notes.append(
                f"{files.single.name} is read as transformers does; the shards of {files.stem} "
                "beside it are not (left over from another save?)"
            )
        return None, {files.single.name: files.single}
    if files.index is None:
        paths = shard_files(files, folder)
        notes.append(f"no index: {len(paths)} shards are read by their numbers")
        return None, {p.name: p for p in paths}
    index = read_index(files.index)
    used = dict.fromkeys(index.values())
    missing = sorted(n for n in used if not (folder / n).is_file())
    if missing:
        raise FormatError(
            f"{folder}: {len(missing)} of {len(used)} files named by {files.index.name} are "
            f"missing: {', '.join(missing[:8])}"
        )
    stale = stale_files(files, used)
    if stale:
        notes.append(
            f"{counted(len(stale), 'file is', 'files are')} "
            "not in the index and not read (left over from an earlier "
            f"save): {', '.join(stale[:4])}"
        )
    return index, {n: folder / n for n in used}


def _load(paths: Mapping[str, Path]) -> dict[str, dict[str, Leaf]]:
    """Return {file name: {tensor: leaf}}."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(_read_file, paths.values()), strict=True))


def _read_file(path: Path) -> dict[str, Leaf]:
    if path.suffix == ".bin":
        return _read_bin(path)
    header = read_header(path)
    source = FileSource(path, header.file_size)
    return {name: tensor_at(source, entry) for name, entry in header.tensors.items()}


def tensor_at(source: FileSource, entry: Entry) -> LazyTensor:
    """Return the lazy tensor of a header entry; packed 4-bit pairs become bytes."""
    shape, dtype = entry.shape, entry.dtype
    if dtype.name == _PACKED and shape:
        shape, dtype = (*shape[:-1], shape[-1] // 2), np.dtype(np.uint8)
    return Chunked.contiguous(source, entry.start, shape, dtype)


def _read_bin(path: Path) -> dict[str, Leaf]:
    root = open_torch_file(path).root
    if not isinstance(root, dict):
        raise FormatError(f"{path}: holds no state dict but a {type(root).__name__}")
    for name, value in root.items():
        if kind := exotic_kind(value):
            raise UnsupportedError(f"{path}: {name!r} is {kind}, which mconv cannot read")
    found: dict[str, Leaf] = {str(k): v for k, v in root.items() if type(v) is StoredTensor}
    return found or dict(examine(root).weights)


def _select(
    folder: Path,
    index: Mapping[str, str] | None,
    tables: Mapping[str, Mapping[str, Leaf]],
    notes: list[str],
) -> tuple[dict[str, Leaf], dict[str, tuple[LazyTensor, ...]]]:
    """Return the tensors, and further copies of those that are in several files."""
    places: dict[str, list[str]] = {}
    for file, table in tables.items():
        for name in table:
            places.setdefault(name, []).append(file)
    twice = {n: f for n, f in places.items() if len(f) > 1}
    if index is None:
        if twice:
            name, where = next(iter(twice.items()))
            raise FormatError(
                f"{folder}: {counted(len(twice), 'tensor is', 'tensors are')} "
                "in several files and there is no index to "
                f"tell which is valid; the first: {name!r} in {', '.join(where)}"
            )
        if not places:
            raise FormatError(f"{folder}: the files hold no tensors")
        return {n: t for table in tables.values() for n, t in table.items()}, {}
    _check_index(folder, index, tables, places)
    extra = [n for n in places if n not in index]
    if extra:
        notes.append(
            f"{counted(len(extra), 'tensor is', 'tensors are')} "
            "in the files but not in the index; they are read too: "
            f"{extra[0]}"
        )
    chosen = {n: tables[f][n] for n, f in index.items()}
    for name in extra:
        if name in twice:
            raise FormatError(f"{folder}: {name!r} is in several files and not in the index")
        chosen[name] = tables[places[name][0]][name]
    if twice:
        notes.append(
            f"{counted(len(twice), 'tensor is', 'tensors are')} "
            "in several files; the index tells which is read"
        )
    replicas = {
        n: tuple(as_lazy(tables[f][n]) for f in files if f != index[n])
        for n, files in twice.items()
    }
    return chosen, replicas


def _check_index(
    folder: Path,
    index: Mapping[str, str],
    tables: Mapping[str, Mapping[str, Leaf]],
    places: Mapping[str, Sequence[str]],
) -> None:
    lost = [n for n, f in index.items() if n not in tables[f]]
    if not lost:
        return
    name = lost[0]
    where = places.get(name)
    found = f"it is in {', '.join(where)}" if where else "it is in none of the files"
    raise FormatError(
        f"{folder}: the index and the files disagree on {counted(len(lost), 'tensor')}: "
        f"{name!r} should be "
        f"in {index[name]}, but {found}; shard files were swapped, or belong to different saves"
    )


def read_set(folder: Path, stem: str, notes: list[str]) -> dict[str, LazyTensor]:
    """Return the tensors of the safetensors files ``stem*`` beside the model; empty without any.

    Raises:
        FormatError: missing or damaged files, or an index that contradicts them.
    """
    files = next((s for s in file_sets(folder, stem) if s.kind == "safetensors"), None)
    if files is None:
        return {}
    index, paths = _parts(folder, folder, files, notes)
    leaves, _ = _select(folder, index, _load(paths), notes)
    return {n: as_lazy(t) for n, t in leaves.items()}


def _optimizer(
    folder: Path, weights: Mapping[str, LazyTensor], notes: list[str]
) -> dict[str, dict[str, LazyTensor]]:
    """Return the states in ``optimizer*.safetensors`` beside the model (``<state>.<weight>``)."""
    leaves = read_set(folder, "optimizer", notes)
    found: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in leaves.items():
        state, _, name = key.partition(".")
        if name in weights:
            found.setdefault(state, {})[name] = tensor
        else:
            notes.append(f"optimizer state {key!r} belongs to no weight and is left out")
    return found


def _version(config: Mapping[str, object] | None) -> str | None:
    value = config.get("transformers_version") if config else None
    return value if isinstance(value, str) else None


def trainer_step(folder: Path) -> int | None:
    """The step that the Hugging Face Trainer noted beside the model."""
    try:
        state = json.loads(read_small(folder / "trainer_state.json"))
        step = state["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


FORMAT = Format("hf", "Hugging Face safetensors or .bin", detect, open_hf, rank=50)
