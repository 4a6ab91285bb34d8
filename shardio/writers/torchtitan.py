"""``--to torchtitan``: a checkpoint folder of torchtitan, ``step-<N>/`` with a DCP in its names.

Model keys lie at the top level, the optimizer flattened by parameter name beside them
(``optimizer.state.<name>.exp_avg``, ``optimizer.param_groups.<name>.lr``), then ``train_state`` and
``lr_scheduler``. Bare weights are ``step-0``, from which torchtitan trains anew. Source:
torchtitan ``components/checkpointer``, ``components/optimizer``, ``trainer.py`` of 2025 and 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import LayoutError
from ..checkpoint import Checkpoint
from ..dcp_plan import DcpPlan
from ..layout import Layout
from ..stored import is_whole
from ..stream import OutFile
from ..tensor import from_array
from ..training_state import TrainingState, full_precision, training_state, with_aliases
from . import Planned, Writer
from ._common import assets, only_axes, schedules


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the folder for a mesh of dp x tp ranks.

    Raises:
        LayoutError: other axes; any mesh loads what one wrote, pipeline stages included.
    """
    only_axes(layout, "dp", "tp")
    dcp = DcpPlan(layout.tp, layout.dp)
    for name, tensor in with_aliases(full_precision(ckpt, layout), ckpt.tied).items():
        dcp.tensor((name,), tensor, name)
    notes: list[str] = []
    step = 0
    if ckpt.optimizer:
        training = training_state(ckpt)
        notes += training.warnings
        step = ckpt.step if ckpt.step is not None else training.step
        if not step:
            raise LayoutError(
                "torchtitan: the step is not known, and step-0 holds weights only: write with "
                "--weights-only"
            )
        _optimizer(dcp, training)
        _run(dcp, ckpt, step, notes)
    folder = f"step-{step}"
    files = [OutFile(f"{folder}/{f.name}", f.size, f.parts) for f in dcp.files()]
    return Planned((*files, *assets(ckpt)), tuple(notes))


def _optimizer(dcp: DcpPlan, training: TrainingState) -> None:
    """As ``get_optimizer_state_dict`` flattens it."""
    step = from_array(np.array(training.step, np.float32))
    for name in training.trained:
        state = {s: tensors[name] for s, tensors in training.states.items() if name in tensors}
        if state:
            dcp.tensor(("optimizer", f"state.{name}.step"), step, "")
        for kind, tensor in state.items():
            dcp.tensor(("optimizer", f"state.{name}.{kind}"), tensor, name)
    for group in training.groups:
        settings = dict(group.settings)
        if "lr" in settings:  # the scheduler adds it, and loading asks for every key
            settings.setdefault("initial_lr", settings["lr"])
        for name in group.names:
            for key, value in settings.items():
                dcp.value(("optimizer", f"param_groups.{name}.{key}"), value)


def _run(dcp: DcpPlan, ckpt: Checkpoint, step: int, notes: list[str]) -> None:
    """Counters and schedule; the data loader's position belongs to the old ranks."""
    saved = ckpt.args.get("train_state")
    known = dict(saved) if isinstance(saved, Mapping) and is_whole(saved) else {}
    if "ntokens_seen" not in known:
        notes.append("the number of tokens seen is not known: it counts from 0 again")
    dcp.tree(("train_state",), {"ntokens_seen": 0, **known, "step": step})
    schedule: Any = schedules(ckpt).get("lr_scheduler")
    if not (isinstance(schedule, Mapping) and "last_epoch" in schedule):
        schedule = {"last_epoch": step}
    dcp.tree(("lr_scheduler",), schedule)
    notes.append(
        "the data loader's position is not carried: load with exclude_from_loading=['dataloader']"
    )


WRITER = Writer("torchtitan", "torchtitan (DCP)", "torchtitan", plan)
