"""``--to deepspeed``: ZeRO stage 0 to 3 for ``dp`` ranks, which ``load_checkpoint`` resumes.

``<tag>/`` with a model file (stage 3: one per rank), an optimizer file per rank (stage 0 has it in
the model file, whatever ``dp``), and ``latest``; all that for each of the ``tp`` ranks of AutoTP.
Pipelines go to ``deepspeed_pipeline``.
Parameters lie in the flat vectors in the order of the checkpoint's weights, which must be the order
in which the model registers them. Without optimizer states only stage 3 has optimizer files, since
its weights lie there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..box import Index
from ..checkpoint import Checkpoint
from ..deepspeed.flat_cut import FlatGroup, shard_vector, subgroups
from ..deepspeed.mp_part import Cut, part_of
from ..deepspeed.pipeline import NAMING
from ..deepspeed.stage0_cut import stage0_optimizer
from ..deepspeed.state_files import SUB_GROUP, Source, model_state, optimizer_head, source_of
from ..deepspeed.tp_cut import autotp_info, autotp_placements, ties
from ..dtypes import BFLOAT16, is_float
from ..layout import Layout
from ..pickle_write import Instance, Name, torch_size
from ..placement import Replicate
from ..safetensors_plan import plan_bytes
from ..stream import OutFile
from ..tensor import LazyTensor
from ..torchzip_plan import Vector, plan_torch_file, plan_torch_files
from ..training_state import with_aliases
from . import Planned, Writer
from ._common import assets, only_axes

Module = dict[str, LazyTensor]


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the save folder.

    Raises:
        LayoutError: axes other than tp and dp, a tp that does not divide the heads.
        UnsupportedError: a model that AutoTP cannot cut.
    """
    only_axes(layout, "tp", "dp", "zero_stage")
    source = source_of(ckpt, layout, layout.zero_stage)
    cut = Cut({})
    if layout.tp > 1:
        cut = Cut(autotp_placements(ckpt, layout.tp), layout.tp)
        source = _autotp(source, cut)
    parts = [part_of(source, cut, rank=rank) for rank in range(cut.tp)]
    files = [f for part in parts for f in rank_files(part, layout, _module(part))]
    files.append(plan_bytes("latest", source.tag.encode()))
    return Planned((*files, *assets(ckpt)), tuple(source.notes))


def rank_files(source: Source, layout: Layout, module: Module | None) -> Iterator[OutFile]:
    """The files of one model-parallel rank.

    Args:
        source: its part of the model.
        layout: the target.
        module: its weights in the training dtype; None where layer files have them (no stage 3).
    """
    if module is None:
        return (_replicated if layout.zero_stage else _whole)(source, layout, None)
    make = {0: _whole, 3: _sharded}.get(layout.zero_stage, _replicated)
    return make(source, layout, module)


def _autotp(source: Source, cut: Cut) -> Source:
    """The source with AutoTP's metadata and settings."""
    section: dict[str, Any] = {"autotp_size": cut.tp}
    tied = ties(source.ckpt)
    if tied:
        rows = not isinstance(cut.placements[tied[0]], Replicate)
        section["vocab_parallel_lm_head"] = rows
        how = "cut by rows" if rows else "whole on every rank"
        source.note(
            f"{tied[0]} is tied to the head and {how}: train with tensor_parallel: "
            f"{{autotp_size: {cut.tp}, vocab_parallel_lm_head: {str(rows).lower()}}}"
        )
    config = {**source.config, "tensor_parallel": section}
    return replace(source, config=config, rules=autotp_info(source.ckpt, cut.placements))


def _name(source: Source, rank: int) -> str:
    prefix = "bf16_" if source.dtype == BFLOAT16 else ""
    return f"{source.tag}/{prefix}zero_pp_rank_{rank}_mp_rank_{source.mp:02d}_optim_states.pt"


def model_file(source: Source) -> str:
    """The model file of a rank up to stage 2."""
    return f"{source.tag}/mp_rank_{source.mp:02d}_model_states.pt"


def _shapes(source: Source) -> list[dict[str, Index]]:
    """Parameters of each group, in flat order."""
    weights = source.ckpt.weights
    return [{n: weights[n].shape for n in g.names} for g in source.training.groups]


def _param_shapes(groups: list[dict[str, Index]]) -> list[OrderedDict[str, Any]]:
    return [OrderedDict((n, torch_size(s)) for n, s in g.items()) for g in groups]


def _module(source: Source) -> Module:
    """All weights in the training dtype, tied ones as one storage; buffers as they are."""
    return with_aliases(module_weights(source), source.ckpt.tied)


def module_weights(source: Source) -> Module:
    """The weights in the training dtype; buffers as they are."""
    buffers = set(source.training.buffers)
    return {
        n: t if n in buffers or not is_float(t.dtype) else t.cast(source.dtype)
        for n, t in source.ckpt.weights.items()
    }


def _optimizer(source: Source, states: Mapping[int, Any], params: list[list[int]]) -> Any:
    groups = [
        {**g.settings, "params": p} for g, p in zip(source.training.groups, params, strict=True)
    ]
    return {"state": dict(states), "param_groups": groups}


# -- stage 0 --------------------------------------------------------------------------------------


def _whole(source: Source, layout: Layout, module: Module | None) -> Iterator[OutFile]:
    """One file for all ranks."""
    state = model_state(source, module, layout.dp)
    state["optimizer"] = stage0_optimizer(source)
    # DeepSpeed writes None and never looks at it; without it nobody could name the parameters
    state["param_shapes"] = _param_shapes(_shapes(source))
    state["frozen_param_shapes"] = state["frozen_param_fragments"] = None
    source.note("ZeRO stage 0: every rank holds the whole optimizer; --zero-stage 1, 2 or 3 cut it")
    yield plan_torch_file(model_file(source), state)


# -- stages 1 and 2 -------------------------------------------------------------------------------


def _replicated(source: Source, layout: Layout, module: Module | None) -> Iterator[OutFile]:
    shapes = _shapes(source)
    state = model_state(source, module, layout.dp)
    frozen = None
    if module is not None and layout.zero_stage == 2:
        frozen = {n: module[n] for n in source.training.frozen}
    state["param_shapes"] = _param_shapes(shapes)
    state["frozen_param_shapes"] = None
    state["frozen_param_fragments"] = None
    if frozen is not None:
        state["frozen_param_shapes"] = OrderedDict(
            (n, torch_size(t.shape)) for n, t in frozen.items()
        )
        state["frozen_param_fragments"] = OrderedDict(frozen)
    yield plan_torch_file(model_file(source), state)
    if not source.training.states:
        source.note(
            "no optimizer files: load with load_optimizer_states=False (load_module_only=True)"
        )
        return
    groups = [FlatGroup(s, layout.dp) for s in shapes]
    for rank in range(layout.dp):
        yield _partition(source, layout, groups, rank)


def _partition(source: Source, layout: Layout, groups: list[FlatGroup], rank: int) -> OutFile:
    training = source.training
    states = {}
    for k, group in enumerate(groups):
        moments = {s: group.vector(t, rank, padded=True) for s, t in training.states.items()}
        states[k] = {"step": training.step, **moments}
    optimizer = {
        **optimizer_head(source),
        "base_optimizer_state": _optimizer(source, states, [[k] for k in range(len(groups))]),
        "single_partition_of_fp32_groups": [
            g.vector(training.masters, rank, padded=False) for g in groups
        ],
        "zero_stage": layout.zero_stage,
        "group_paddings": [g.size - g.lean(rank) for g in groups],
        "param_alignment_paddings": [[0] * len(g.shapes) for g in groups],
        "partition_count": [layout.dp] * len(groups),
        "param_slice_mappings": [
            OrderedDict((n, _address(*place)) for n, place in g.slices(rank).items())
            for g in groups
        ],
    }
    return _optimizer_file(source, rank, optimizer)


def _optimizer_file(source: Source, rank: int, optimizer: Mapping[str, Any]) -> OutFile:
    root = {
        "optimizer_state_dict": optimizer,
        "ds_config": source.config,
        "ds_version": optimizer["ds_version"],
    }
    return plan_torch_file(_name(source, rank), root)


def _address(start: int, numel: int) -> Instance:
    cls = Name("deepspeed.utils.tensor_fragment", "fragment_address")
    return Instance(cls, {"numel": numel, "start": start})


# -- stage 3 --------------------------------------------------------------------------------------


def _sharded(source: Source, layout: Layout, module: Module) -> Iterator[OutFile]:
    limit = int(source.config["zero_optimization"].get("sub_group_size", SUB_GROUP))
    cut = [subgroups(shapes, layout.dp, limit) for shapes in _shapes(source)]
    flat = [sub for subs in cut for sub in subs]
    if len(flat) > len(cut):
        source.note(
            f"cut into {len(flat)} sub-groups of {limit} elements per rank: train with the same "
            "zero_optimization.sub_group_size"
        )
    yield from _model_shards(source, layout, module, flat)
    numbers = iter(range(len(flat)))
    params = [[next(numbers) for _ in subs] for subs in cut]
    for rank in range(layout.dp):
        yield _optimizer_shard(source, layout, flat, params, rank)


def _model_shards(
    source: Source, layout: Layout, module: Module, flat: list[dict[str, Index]]
) -> Iterator[OutFile]:
    """Placeholders of all parameters, buffers, each rank's part of the frozen ones."""
    buffers, frozen = set(source.training.buffers), source.training.frozen
    hollow = Vector(source.dtype, 0)
    placeholders: dict[str, Any] = {n: t if n in buffers else hollow for n, t in module.items()}
    state = model_state(source, placeholders, layout.dp)
    state["param_shapes"] = _param_shapes(flat)
    state["frozen_param_shapes"] = OrderedDict((n, torch_size(module[n].shape)) for n in frozen)
    state["frozen_param_fragments"] = OrderedDict()
    names = [f"{source.tag}/zero_pp_rank_{rank}_mp_rank_{source.mp:02d}_model_states.pt"
             for rank in range(layout.dp)]  # fmt: skip
    if not frozen:
        yield from plan_torch_files(names, state)
        return
    for rank, name in enumerate(names):
        state["frozen_param_fragments"] = OrderedDict(
            (n, shard_vector({n: module[n].shape}, module, rank, layout.dp)) for n in frozen
        )
        yield plan_torch_file(name, state)


def _optimizer_shard(
    source: Source,
    layout: Layout,
    flat: list[dict[str, Index]],
    params: list[list[int]],
    rank: int,
) -> OutFile:
    training, world = source.training, layout.dp
    states: dict[int, Any] = {}
    for k, sub in enumerate(flat) if training.states else ():
        moments = {s: shard_vector(sub, t, rank, world) for s, t in training.states.items()}
        states[k] = {"step": training.step, **moments}
    optimizer = {
        **optimizer_head(source),
        "zero_stage": 3,
        "partition_count": world,
        "optimizer_state_dict": _optimizer(source, states, params),
        "fp32_flat_groups": [shard_vector(sub, training.masters, rank, world) for sub in flat],
    }
    return _optimizer_file(source, rank, optimizer)


def _instead(ckpt: Checkpoint, layout: Layout) -> str | None:
    """A pipeline stays one where that can be trained, and stages make one.

    ZeRO-2 and 3 do not go with pipelines, nor does a tp of which the source tells no rules: those
    make a Hugging Face model of it.
    """
    ruled = layout.tp == 1 or ckpt.layout.tp > 1 or "universal_checkpoint_info" in ckpt.args
    stays = ckpt.naming == NAMING and layout.zero_stage < 2 and ruled
    return NAMING if stays or layout.pp > 1 or layout.pp_layers else None


WRITER = Writer("deepspeed", "DeepSpeed ZeRO-0 to 3", "hf", plan, ordered=True, instead=_instead)
