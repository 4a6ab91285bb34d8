"""Colossal-AI booster checkpoints: a folder with ``modeling/`` and ``optimizer/``.

The model is gathered over TP and cut into files like Hugging Face's, by pipeline stage
(``pytorch_model-stage-00001-shard-00001.bin``), with an index that is always right. The optimizer
numbers its states in the order of the model's parameters and has no names. Source: ColossalAI
``checkpoint_io/{general,hybrid_parallel,utils}.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ..checkpoint import Checkpoint
from ..coverage import prove
from ..hf_files import INDEX, read_index
from ..layout import Layout
from ..records import StoredTensor
from ..registry import Format, OpenOptions
from ..state_checkpoint import as_lazy
from ..state_naming import name_parameters
from ..state_tree import OptimizerTree
from ..stored import plain
from ..tensor import LazyTensor
from ..torchfile import open_torch_file
from .hf import open_hf

_STAGE = re.compile(r"(?:^|-)stage-(\d+)-")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_FIRST = re.compile(r"embed|wte|wpe")
_UNFINISHED = "tmp_index_files"
_OPTIMIZER_INDEX = "pytorch_optim.bin.index.json"
_THREADS = 8


def detect(path: Path) -> Path | None:
    """Return the folder above ``modeling`` and ``optimizer``."""
    folder = path.parent if path.is_file() else path
    for root in (folder, folder.parent):
        inside = root / "modeling"
        if inside.is_dir() and (_indexes(inside) or (inside / _UNFINISHED).is_dir()):
            return root if folder in (root, inside, root / "optimizer") else None
    return None


def _indexes(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.json") if INDEX.match(p.name) and p.is_file())


def open_colossalai(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a booster checkpoint.

    Raises:
        FormatError: unfinished saves, missing or damaged files.
    """
    indexes = _indexes(root / "modeling")
    if not indexes:
        raise FormatError(
            f"{root / 'modeling'}: has {_UNFINISHED} but no index: the save did not finish"
        )
    model = open_hf(indexes[0], options)
    files = set(read_index(indexes[0]).values())
    stages = {int(m[1]) for f in files if (m := _STAGE.search(f))}
    notes: list[str] = []
    states, step, scalars = _optimizer(root / "optimizer", model.weights, notes)
    for state, tensors in states.items():
        prove(tensors, f"{root}: optimizer state {state}")
    return replace(
        model,
        path=root,
        format="colossalai",
        optimizer=states,
        step=step,
        scalars=scalars,
        layout=Layout(format="colossalai", pp=max(stages, default=1)),
        warnings=(*model.warnings, *notes),
    )


def _optimizer(
    folder: Path, weights: Mapping[str, LazyTensor], notes: list[str]
) -> tuple[dict[str, dict[str, LazyTensor]], int | None, dict[str, Any]]:
    """Return (states, step, scalars); empty without an optimizer that can be read."""
    index = folder / _OPTIMIZER_INDEX
    if not index.is_file():
        if folder.is_dir():
            notes.append(f"{folder.name}/ has no {_OPTIMIZER_INDEX} and is not read")
        return {}, None, {}
    table = read_index(index)
    missing = sorted({f for f in table.values() if not (folder / f).is_file()})
    if missing:
        raise FormatError(f"{folder}: optimizer files are missing: {', '.join(missing[:8])}")
    names = list(dict.fromkeys(table.values()))
    with ThreadPoolExecutor(_THREADS) as pool:
        files = dict(zip(names, pool.map(lambda n: _states(folder / n), names), strict=True))
    found: dict[object, Mapping[str, object]] = {}
    for key, file in table.items():
        if key not in files[file]:
            raise FormatError(
                f"{folder}: the index puts state {key} into {file}, which has "
                f"{', '.join(list(files[file])[:8])}: files were swapped or mixed"
            )
        found[int(key) if key.isdigit() else key] = files[file][key]
    groups = _groups(folder)
    tree = OptimizerTree((), found, tuple(groups))
    shapes = {n: weights[n].shape for n in _model_order(weights)}
    named, lost = name_parameters(tree, shapes, {})
    if lost:
        notes.append(
            f"the optimizer is left out: its {len(lost)} numbered states do not fit the weights in "
            "the usual order (embeddings, layers, the rest)"
        )
    elif named:
        notes.append(
            "the optimizer numbers its states; they are matched to the weights in the usual order "
            "(embeddings, layers, the rest), and all shapes fit"
        )
    out: dict[str, dict[str, LazyTensor]] = {}
    step = None
    for number, state in found.items():
        for kind, value in state.items():
            if kind == "step":
                step = plain(value)
            elif number in named and isinstance(value, StoredTensor):
                out.setdefault(kind, {})[named[number]] = as_lazy(value)
    kept = [{k: v for k, v in plain(g).items() if k != "params"} for g in groups]
    number = int(step) if isinstance(step, int | float) else None
    return out, number, {"param_groups": kept} if kept else {}


def _states(path: Path) -> dict[str, Mapping[str, object]]:
    root = open_torch_file(path).root
    if not isinstance(root, dict):
        raise FormatError(f"{path}: holds no optimizer states but a {type(root).__name__}")
    return {str(k): {str(n): t for n, t in v.items()} for k, v in root.items() if _is_dict(v)}


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _groups(folder: Path) -> list[Mapping[object, object]]:
    index = folder / "pytorch_optim_group.bin"
    root = open_torch_file(index).root if index.is_file() else []
    groups = root.get("param_groups") if isinstance(root, dict) else root
    return [g for g in groups if isinstance(g, dict)] if isinstance(groups, list) else []


def _model_order(weights: Mapping[str, LazyTensor]) -> list[str]:
    """Return the names as the whole model lists them: the files have them stage by stage."""

    def key(name: str) -> tuple[int, int]:
        layer = _LAYER.search(name)
        if layer:
            return 1, int(layer[0])
        return (0, 0) if _FIRST.search(name) else (2, 0)

    return sorted(weights, key=key)


FORMAT = Format("colossalai", "Colossal-AI booster", detect, open_colossalai, rank=40)
