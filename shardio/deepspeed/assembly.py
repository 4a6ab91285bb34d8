"""From a tag folder to a checkpoint: every model-parallel rank is put together over data parallel,
then the ranks over tensor and pipeline parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..layout import Layout
from ..names import stripped
from ..placement import Flat, Placement
from ..registry import OpenOptions
from ..state_checkpoint import model_files
from ..stored import plain
from ..tensor import LazyTensor
from . import neox
from .combine import Whole, combine
from .folder import latest, scan
from .grid import Grid, read_grid
from .pipeline import NAMING, hf_names, naming_of, stage_record

FORMAT = "deepspeed"


def open_folder(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a tag folder.

    Raises:
        FormatError: missing, damaged, swapped or mixed files.
        UnsupportedError: valid checkpoints that cannot be read.
    """
    grid = read_grid(scan(root))
    config, assets = model_files(root, options)
    whole = combine(grid, config)
    part, first = whole.part, grid.first
    table = stripped([*part.weights, *part.tied])
    return Checkpoint(
        path=root,
        format=FORMAT,
        version=first.fields.text("ds_version"),
        naming=naming_of(part.weights),
        weights=renamed(part.weights, table),
        optimizer={s: renamed(t, table) for s, t in part.optimizer.items()},
        step=grid.step,
        config=config,
        args=_args(grid, whole) | {"buffer_names": [table.get(n, n) for n in grid.first.buffers]},
        scalars=_scalars(grid, table) | part.scalars,
        layout=Layout(
            FORMAT, tp=whole.tp, pp=whole.pp, ep=grid.ep, dp=grid.dp, zero_stage=grid.stage
        ),
        placements={table[n]: _mesh(whole, n) for n in part.weights if _mesh(whole, n)},
        replicas={table[n]: tuple(c) for n, c in part.copies.items()},
        tied={table[a]: table.get(o, o) for a, o in part.tied.items()},
        assets=assets,
        warnings=(
            *grid.warnings,
            *part.warnings,
            *_without_optimizer(grid),
            *_unfinished_latest(root),
        ),
    )


def _mesh(whole: Whole, name: str) -> dict[str, Placement]:
    mesh: dict[str, Placement] = {}
    if name in whole.placements:
        mesh["tp"] = whole.placements[name]
    if name in whole.part.cut:
        mesh["dp"] = Flat()
    return mesh


def renamed(tensors: Mapping[str, LazyTensor], table: Mapping[str, str]) -> dict[str, LazyTensor]:
    """Rename by a table; names outside it stay."""
    return {table.get(n, n): t for n, t in tensors.items()}


def _without_optimizer(grid: Grid) -> list[str]:
    if grid.folder.expert_optim:
        return [
            "the optimizer states of the experts (expp_rank_* files, MoE without ZeRO) are not read"
        ]
    zero = grid.first.config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if grid.optims[0] or not stage:
        return []
    return [
        f"no optimizer files, although training ran with ZeRO stage {stage}: weights only "
        "(16-bit, as the model file has them)"
    ]


def _unfinished_latest(root: Path) -> list[str]:
    """``latest`` is written last: a tag that it names and that is not there was lost since."""
    tag = latest(root.resolve().parent)
    if tag is None or tag == root.resolve().name:
        return []
    named = root.resolve().parent / tag
    if named.is_dir() and any(named.iterdir()):
        return []
    return [
        f"{root.parent / 'latest'} names {tag}, which is not there: this is an older save "
        f"({root.name})"
    ]


def _args(grid: Grid, whole: Whole) -> dict[str, Any]:
    first = grid.first
    known: dict[str, Any] = {"ds_config": first.config, "client_state": first.client()}
    names = hf_names(whole.part.weights, whole.part.tied) if grid.folder.layers else None
    if names:
        known["hf_names"] = names
    if naming_of(whole.part.weights) == NAMING:
        known["pipeline"] = stage_record(grid, whole.tp)
    if first.training_dtype:
        known["training_dtype"] = first.training_dtype
    if neox.is_neox(whole.part.weights):
        known["neox_args"] = neox.read_settings(grid.folder.path, first.fields.plain("args"), None)
    if whole.averaged:
        known["averaged"] = whole.averaged
    for key in ("universal_checkpoint_info", "num_experts", "global_samples", "skipped_steps"):
        if first.fields.get(key) is not None:
            known[key] = first.fields.plain(key)
    return known


def _scalars(grid: Grid, names: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"lr_scheduler": grid.first.fields.plain("lr_scheduler")}
    for rank in grid.optims[0][:1]:
        found["param_groups"] = [_named_group(grid, g, names) for g in rank.param_groups]
        found["optimizer_steps"] = list(rank.steps)
        found["loss_scaler"] = plain(rank.fields.get("loss_scaler"))
        found["clip_grad"] = rank.fields.plain("clip_grad")
    return {k: v for k, v in found.items() if v is not None}


def _named_group(grid: Grid, group: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a group with the names of its weights instead of numbers of flat vectors.

    Numbers stay where the files do not list names, or list names of pipeline layers.
    """
    found: dict[str, None] = {}
    for ranks, optims in zip(grid.models, grid.optims, strict=True):
        tables = ranks[0].groups or ()
        if optims and len(tables) != len(optims[0].masters):
            tables = tuple(t for t in tables if t)
        for number in group.get("params") or ():
            if type(number) is not int or not 0 <= number < len(tables):
                return dict(group)
            found |= dict.fromkeys(tables[number])
    if not found or any(n not in names for n in found):
        return dict(group)
    return {**group, "params": [names[n] for n in found]}
