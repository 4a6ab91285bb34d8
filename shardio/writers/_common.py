"""What several writers share: refusing axes they do not have, config and tokenizer files,
schedules that pass through as plain data.
"""

from __future__ import annotations

from typing import Any

from ...errors import LayoutError
from ..checkpoint import Checkpoint
from ..layout import Layout
from ..safetensors_plan import plan_copies, plan_json
from ..stored import is_whole
from ..stream import OutFile

_NOT_SCHEDULES = ("param_groups", "optimizer_steps", "loss_scaler", "clip_grad")


def only_axes(layout: Layout, *axes: str) -> None:
    """Refuse a layout that uses other axes than the given ones.

    Raises:
        LayoutError: naming the axes that the format does not have.
    """
    foreign = {k: v for k, v in layout.sizes().items() if k not in axes}
    if foreign:
        shown = ", ".join(f"{k}={v}" for k, v in foreign.items())
        has = f"it has {', '.join(axes)}" if axes else "it is not cut at all"
        raise LayoutError(f"format {layout.format!r} cannot be cut by {shown}: {has}")
    if layout.pp_layers is not None and "pp" not in axes:
        raise LayoutError(f"format {layout.format!r} cannot be cut by pp_layers: it has no stages")


def assets(ckpt: Checkpoint) -> list[OutFile]:
    """Config and tokenizer files, as they were."""
    files: list[OutFile] = []
    if ckpt.config is not None:
        files.append(plan_json("config.json", dict(ckpt.config)))
    return files + plan_copies([p for p in ckpt.assets if p.name != "config.json"], files)


def schedules(ckpt: Checkpoint) -> dict[str, Any]:
    """Learning-rate schedules and the like from the source, as plain data."""
    found = {k: v for k, v in ckpt.scalars.items() if k not in _NOT_SCHEDULES}
    return {k: v for k, v in found.items() if is_whole(v)}
