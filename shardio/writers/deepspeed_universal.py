"""``--to deepspeed-universal``: a file per parameter and state, for any ZeRO stage and world.

``<tag>/zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt``, model files without shards, and
``latest_universal``; load with ``"checkpoint": {"load_universal": true}``. After
``deepspeed/checkpoint/{ds_to_universal,universal_checkpoint}.py``: stages 1 and 2 read the groups
at the top of ``optimizer_state.pt``, stage 3 those in ``optimizer_state_dict``; both are written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..deepspeed.state_files import Source, model_state, optimizer_head, source_of
from ..dtypes import is_float
from ..layout import Layout
from ..pickle_write import torch_size
from ..safetensors_plan import plan_bytes
from ..stream import OutFile
from ..tensor import LazyTensor
from ..torchzip_plan import Vector, plan_torch_file
from ..training_state import with_aliases
from . import Planned, Writer
from ._common import assets, only_axes

_CAT_DIM = 0  # of a tensor that no rank had cut


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the save folder. Raises LayoutError for any axis: nothing is cut."""
    only_axes(layout)
    source = source_of(ckpt, layout, 1)
    if source.training.frozen or source.training.buffers:
        source.note(
            "DeepSpeed loads no frozen weights and buffers from universal checkpoints: load them "
            "from the base model"
        )
    if len(source.training.groups) > 1:
        source.note(
            "under ZeRO-3, DeepSpeed gives every parameter group the settings of the first when it "
            "loads a universal checkpoint: set weight decay and the like again after loading"
        )
    files = [*_parameters(source), _optimizer(source), *_models(source)]
    files.append(plan_bytes("latest_universal", source.tag.encode()))
    return Planned((*files, *assets(ckpt)), tuple(source.notes))


def _parameters(source: Source) -> Iterator[OutFile]:
    training = source.training
    states = {"fp32": training.masters, **training.states}
    for name in training.trained:
        folder = f"{source.tag}/zero/{name}"
        for state, tensors in states.items():
            if name in tensors:
                root = {"cat_dim": _CAT_DIM, "param": tensors[name]}
                yield plan_torch_file(f"{folder}/{state}.pt", root)
        yield plan_torch_file(f"{folder}/step.pt", _step(source))


def _step(source: Source) -> np.ndarray:
    """A tensor, as torch's Adam counts; stage 1 and 2 put it into the optimizer as it is."""
    return np.array(source.training.step, np.float32)


def _optimizer(source: Source) -> OutFile:
    groups = [{**g.settings, "params": [k]} for k, g in enumerate(source.training.groups)]
    root: dict[str, Any] = {
        **optimizer_head(source),
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": _step(source)}}, "param_groups": groups},
    }
    return plan_torch_file(f"{source.tag}/zero/optimizer_state.pt", root)


def _models(source: Source) -> Iterator[OutFile]:
    """The model file of stages 1 and 2 with the weights, that of stage 3 with placeholders."""
    buffers, weights = set(source.training.buffers), source.ckpt.weights
    module: dict[str, LazyTensor] = {
        n: t if n in buffers or not is_float(t.dtype) else t.cast(source.dtype)
        for n, t in weights.items()
    }
    whole = with_aliases(module, source.ckpt.tied)
    hollow = Vector(source.dtype, 0)
    for name, content in (
        ("mp_rank_00_model_states.pt", whole),
        (
            "zero_pp_rank_0_mp_rank_00_model_states.pt",
            {n: t if n in buffers else hollow for n, t in whole.items()},
        ),
    ):
        state = model_state(source, content, 1)
        state["param_shapes"] = [
            OrderedDict((n, torch_size(weights[n].shape)) for n in g.names)
            for g in source.training.groups
        ]
        yield plan_torch_file(f"{source.tag}/{name}", state)


WRITER = Writer("deepspeed-universal", "DeepSpeed universal", "hf", plan, ordered=True)
