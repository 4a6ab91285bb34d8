"""From a tag folder to a checkpoint: every model-parallel rank is put together over data parallel,
then the ranks over tensor and pipeline parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from ..assets import around, find_assets, load_config
from ..checkpoint import Checkpoint
from ..layout import Layout
from ..names import stripped
from ..placement import Flat, Placement
from ..registry import OpenOptions
from ..stored import plain
from ..tensor import LazyTensor
from .folder import scan
from .grid import Grid, read_grid
from .parts import Part, low_stage, stage3

FORMAT = "deepspeed"


def open_folder(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a tag folder.

    Raises:
        FormatError: missing, damaged, swapped or mixed files.
        UnsupportedError: valid checkpoints that cannot be read.
    """
    grid = read_grid(scan(root))
    part = whole(grid)
    assets = find_assets([options.config] if options.config else around(root))
    first, optims = grid.first, [o for ranks in grid.optims for o in ranks]
    table = stripped([*part.weights, *part.tied])
    mesh: dict[str, Mapping[str, Placement]] = {table[n]: {"dp": Flat()} for n in part.cut}
    return Checkpoint(
        path=root,
        format=FORMAT,
        version=first.fields.text("ds_version"),
        weights=renamed(part.weights, table),
        optimizer={s: renamed(t, table) for s, t in part.optimizer.items()},
        step=grid.step,
        config=load_config(assets),
        args=_args(grid),
        scalars=_scalars(grid),
        layout=Layout(FORMAT, dp=grid.dp, zero_stage=grid.stage),
        placements=mesh,
        replicas={table[n]: tuple(c) for n, c in part.copies.items()},
        tied={table[a]: table.get(o, o) for a, o in part.tied.items()},
        assets=assets,
        warnings=(*grid.warnings, *part.warnings, *_without_optimizer(grid, bool(optims))),
    )


def whole(grid: Grid) -> Part:
    """Return the whole model."""
    if len(grid.models) > 1:
        raise UnsupportedError(f"{grid.folder.path}: model parallel")
    models, optims = grid.models[0], grid.optims[0]
    return stage3(models, optims) if grid.folder.shards else low_stage(models[0], optims)


def renamed(tensors: Mapping[str, LazyTensor], table: Mapping[str, str]) -> dict[str, LazyTensor]:
    """Rename by a table; names outside it stay."""
    return {table.get(n, n): t for n, t in tensors.items()}


def _without_optimizer(grid: Grid, found: bool) -> list[str]:
    zero = grid.first.config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if found or not stage:
        return []
    return [
        f"no optimizer files, although training ran with ZeRO stage {stage}: weights only "
        "(16-bit, as the model file has them)"
    ]


def _args(grid: Grid) -> dict[str, Any]:
    first = grid.first
    known = {"ds_config": first.config, "client_state": first.client()}
    for key in ("universal_checkpoint_info", "num_experts", "global_samples", "skipped_steps"):
        if first.fields.get(key) is not None:
            known[key] = first.fields.plain(key)
    return known


def _scalars(grid: Grid) -> dict[str, Any]:
    found: dict[str, Any] = {"lr_scheduler": grid.first.fields.plain("lr_scheduler")}
    for rank in grid.optims[0][:1]:
        found["param_groups"] = list(rank.param_groups)
        found["optimizer_steps"] = list(rank.steps)
        found["loss_scaler"] = plain(rank.fields.get("loss_scaler"))
    return {k: v for k, v in found.items() if v is not None}
