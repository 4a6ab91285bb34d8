"""``--to megatron``: Megatron-LM's legacy ``torch`` format, one file per model-parallel rank.

``iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`` with the model's state dict, the args and
the optimizer; ``distrib_optim.pt`` beside it with ``--zero-stage 1``. Bare weights are written as a
``release``, from which Megatron starts anew. Source: ``megatron/training/checkpointing.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import LayoutError
from ..checkpoint import Checkpoint
from ..layout import Layout
from ..megatron.divide import Division, Place, divide
from ..megatron.optimizer import DISTRIBUTED
from ..megatron.random_states import random_states
from ..megatron.rank_optimizer import (
    OptimizerPlan,
    flat_buffers,
    group_settings,
    optimizer_plan,
    plain_optimizer,
)
from ..megatron.ranks import MODEL_FILES, TRACKER, rank_name
from ..megatron.run_state import Run, counters, run_of, saved_args
from ..megatron.settings import Sizes
from ..safetensors_plan import plan_bytes
from ..stream import OutFile
from ..tensor import LazyTensor
from ..torchzip_plan import plan_torch_file
from . import Planned, Writer
from ._common import assets, only_axes

AXES = ("tp", "pp", "vpp", "ep", "etp", "cp", "dp", "zero_stage")


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the rank files of a checkpoint with Megatron names.

    Raises:
        LayoutError: sizes that do not divide the model, or ranks the format has no name for.
        UnsupportedError: tensors that Megatron's GPT models do not have.
    """
    check_axes(layout)
    division = divide(ckpt, layout)
    if division.experts and layout.tp % division.etp:
        raise LayoutError(
            f"etp={division.etp}: the legacy format has no names for expert tensor ranks beyond "
            f"tp={layout.tp}; use --etp {layout.tp}, or --to megatron-dist"
        )
    run = run_of(ckpt, division)
    optimizer = optimizer_plan(run) if run.training else None
    common = counters(run)
    files = []
    for place in division.places():
        files += _rank(run, optimizer, place, common)
    files.append(plan_bytes(TRACKER, run.tracker.encode()))
    return Planned((*files, *assets(ckpt)), tuple(run.notes))


def check_axes(layout: Layout) -> None:
    """Refuse what Megatron has no word for. Raises LayoutError."""
    only_axes(layout, *AXES)
    if layout.zero_stage > 1:
        raise LayoutError(
            f"zero_stage={layout.zero_stage}: Megatron's distributed optimizer is stage 1; use "
            "--zero-stage 1, or 0 for a plain optimizer"
        )


def _rank(
    run: Run, optimizer: OptimizerPlan | None, place: Place, common: dict[str, Any]
) -> list[OutFile]:
    division = run.division
    layout = division.layout
    sizes = Sizes(layout.tp, division.stages.pp, division.stages.vpp, layout.ep, division.etp)
    folder = f"{run.folder}/{rank_name(place.tp, place.pp, place.ep, sizes)}"
    number = place.pp * division.stage_size + place.rank
    root = {"args": saved_args(run, number, "torch"), **common}
    chunks = [division.chunk(place, c, division.weights) for c in range(sizes.vpp)]
    for c, chunk in enumerate(chunks):
        root["model" if sizes.vpp == 1 else f"model{c}"] = _state_dict(division, chunk)
    files = []
    if optimizer and run.distributed:
        root["optimizer"] = group_settings(optimizer)
        buffers = flat_buffers(optimizer, place, chunks)
        files.append(plan_torch_file(f"{folder}/{DISTRIBUTED}", buffers))
    elif optimizer:
        root["optimizer"] = plain_optimizer(optimizer, place, chunks)
    if run.training:
        root["rng_state"] = random_states(division.args.get("seed"), place)
    return [plan_torch_file(f"{folder}/{MODEL_FILES[0]}", root), *files]


def _state_dict(division: Division, chunk: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """``state_dict()`` of a model chunk, with the (empty) extra states that loading asks for."""
    found: dict[str, Any] = {}
    for name, tensor in chunk.items():
        found[name] = tensor
        found |= dict.fromkeys(division.spelling.extra(name))
    return found


WRITER = Writer("megatron", "Megatron-LM (torch, one file per rank)", "megatron", plan)
