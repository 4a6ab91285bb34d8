"""``--to dcp``: a PyTorch distributed checkpoint that ``dcp.load`` reads at any world size.

Keys as ``torch.distributed.checkpoint.state_dict`` makes them from a dict of ``model`` and
``optim``: ``model.<name>``, ``optim.state.<name>.exp_avg``, ``optim.param_groups.<i>.lr``. FSDP's
parameters are the fp32 masters, so these are the model's weights where the source has them.
"""

from __future__ import annotations

import numpy as np

from ..checkpoint import Checkpoint
from ..dcp_plan import DcpPlan
from ..layout import Layout
from ..tensor import from_array
from ..training_state import TrainingState, full_precision, training_state, with_aliases
from . import Planned, Writer
from ._common import assets, only_axes, schedules


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the folder for a mesh of dp x tp ranks. Raises LayoutError for other axes."""
    only_axes(layout, "dp", "tp")
    dcp = DcpPlan(layout.tp, layout.dp)
    for name, tensor in with_aliases(full_precision(ckpt, layout), ckpt.tied).items():
        dcp.tensor(("model", name), tensor, name)
    notes: tuple[str, ...] = ()
    if ckpt.optimizer:
        training = training_state(ckpt)
        _optimizer(dcp, training)
        for key, value in schedules(ckpt).items():
            dcp.tree((key,), value if isinstance(value, dict) else {"value": value})
        notes = training.warnings
    return Planned((*dcp.files(), *assets(ckpt)), notes)


def _optimizer(dcp: DcpPlan, training: TrainingState) -> None:
    step = from_array(np.array(training.step, np.float32))
    for name in training.trained:
        state = {s: tensors[name] for s, tensors in training.states.items() if name in tensors}
        if state:
            dcp.tensor(("optim", "state", name, "step"), step, "")
        for kind, tensor in state.items():
            dcp.tensor(("optim", "state", name, kind), tensor, name)
    for k, group in enumerate(training.groups):
        settings = dict(group.settings)
        if "lr" in settings:  # a scheduler adds it, and loading asks for every key of the optimizer
            settings.setdefault("initial_lr", settings["lr"])
        for key, value in {**settings, "params": list(group.names)}.items():
            dcp.value(("optim", "param_groups", k, key), value)


WRITER = Writer("dcp", "PyTorch distributed checkpoint", "hf", plan)
