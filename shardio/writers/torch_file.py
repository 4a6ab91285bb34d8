"""``--to torch``: one ``torch.save`` file with the model's own names.

Weights alone are a bare state dict, ``pytorch_model.bin``, which transformers loads. With the
optimizer the file is ``checkpoint.pt``: ``model``, ``optimizer`` (as ``Optimizer.state_dict()``
with ``param_names``), ``step``, schedules. Source: ``torch/serialization.py``,
``torch/optim/optimizer.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..layout import Layout
from ..torchzip_plan import plan_torch_file
from ..training_state import TrainingState, full_precision, training_state, with_aliases
from . import Planned, Writer
from ._common import assets, only_axes, schedules

WEIGHTS = "pytorch_model.bin"
CHECKPOINT = "checkpoint.pt"


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the file. Raises LayoutError for any parallel axis: it is one file."""
    only_axes(layout)
    if not ckpt.optimizer:
        state = OrderedDict(with_aliases(ckpt.weights, ckpt.tied))
        return Planned((plan_torch_file(WEIGHTS, state), *assets(ckpt)))
    training = training_state(ckpt)
    model = OrderedDict(with_aliases(full_precision(ckpt, layout), ckpt.tied))
    root: dict[str, Any] = {"model": model, "optimizer": _optimizer(training)}
    root["step"] = ckpt.step if ckpt.step is not None else training.step
    root |= schedules(ckpt)
    files = (plan_torch_file(CHECKPOINT, root), *assets(ckpt))
    return Planned(files, training.warnings)


def _optimizer(training: TrainingState) -> dict[str, Any]:
    """States numbered by parameter, groups that list numbers and names."""
    number = {n: k for k, n in enumerate(training.trained)}
    table: dict[int, dict[str, Any]] = {}
    for name, k in number.items():
        state = {s: tensors[name] for s, tensors in training.states.items() if name in tensors}
        if state:
            table[k] = {"step": np.array(training.step, np.float32), **state}
    groups = [
        {**g.settings, "params": [number[n] for n in g.names], "param_names": list(g.names)}
        for g in training.groups
    ]
    return {"state": table, "param_groups": groups}


WRITER = Writer("torch", "one torch.save file", "hf", plan, ordered=True)
