"""Optimizer states of legacy ``torch`` checkpoints, brought under the weights' names.

Source: ``megatron/core/optimizer/{optimizer,distrib_optimizer,__init__}.py``. Three layouts: the
torch optimizer's own dict (fp32 training), the same plus ``fp32_from_fp16_params`` (plain mixed
precision), and ``distrib_optim.pt`` with flat buffers (distributed optimizer). None of them has
names: they follow from the order of the model's dict. What cannot be assigned with certainty is
left out with a warning; the weights do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...errors import UnsupportedError
from ..records import StoredTensor
from ..source import FileSource
from ..stored import lazy, plain
from ..tensor import LazyTensor
from ..torchfile import open_torch_file
from .buffers import Param, buffers_of, spans_of, unflatten
from .merge import RankPart, World, assemble, collect
from .names import canonical, is_expert, is_parameter
from .ranks import RankFile

DISTRIBUTED = "distrib_optim.pt"
_STATES = {"param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")

States = dict[str, dict[str, LazyTensor]]  # state to saved name to tensor


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What was saved of the optimizer.

    Attributes:
        tensors: state to canonical weight name to tensor.
        scalars: ``param_groups`` and ``opt_param_scheduler`` as plain data.
        warnings: why states were left out.
    """

    tensors: Mapping[str, Mapping[str, LazyTensor]] = field(default_factory=dict)
    scalars: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_optimizer(files: Sequence[RankFile], parts: Sequence[RankPart], world: World) -> Optimizer:
    """Read the optimizer of all ranks.

    Raises:
        FormatError: damaged files, or ranks that do not fit together.
    """
    first = files[0].root
    scheduler = first.get("opt_param_scheduler", first.get("lr_scheduler"))
    scalars: dict[str, object] = {}
    if isinstance(scheduler, dict):
        scalars["opt_param_scheduler"] = plain(scheduler)
    if first.get("optimizer") is None:
        return Optimizer(scalars=scalars)
    by_file: dict[tuple[int, int, int], list[RankPart]] = {}
    for part in parts:
        by_file.setdefault((part.tp, part.pp, part.ep), []).append(part)
    ranked: dict[str, list[RankPart]] = {}
    try:
        for file in files:
            chunks = by_file[file.tp, file.pp, file.ep]
            groups, states = _read_rank(file, chunks, world)
            scalars.setdefault("param_groups", groups)
            for state, tensors in states.items():
                ranked.setdefault(state, []).extend(_per_chunk(chunks, tensors))
    except UnsupportedError as e:
        return Optimizer(scalars=scalars, warnings=(f"optimizer states are left out: {e}",))
    merged = {
        state: assemble(collect(rank, world), world).tensors for state, rank in ranked.items()
    }
    return Optimizer(merged, scalars)


def with_masters(
    states: Mapping[str, Mapping[str, LazyTensor]], weights: Mapping[str, LazyTensor]
) -> dict[str, Mapping[str, LazyTensor]]:
    """Return the states, the weights themselves standing in for masters of fp32 parameters."""
    moments = states.get("exp_avg", {})
    masters = dict(states.get("master", {}))
    for name in moments:
        if name not in masters and name in weights and weights[name].dtype == np.float32:
            masters[name] = weights[name]
    return {**states, "master": masters} if masters else dict(states)


def _per_chunk(chunks: Sequence[RankPart], tensors: Mapping[str, LazyTensor]) -> Iterator[RankPart]:
    """Spread tensors keyed ``chunk/name`` over parts like those of the weights."""
    for c in chunks:
        own = {n: tensors[f"{c.chunk}/{n}"] for n in c.tensors if f"{c.chunk}/{n}" in tensors}
        yield RankPart(c.tp, c.pp, c.ep, c.chunk, c.where, own)


def _read_rank(
    file: RankFile, chunks: Sequence[RankPart], world: World
) -> tuple[list[object], dict[str, dict[str, LazyTensor]]]:
    apart = world.sizes.ep > 1  # else experts are parameters like all others
    params = [
        Param(f"{c.chunk}/{name}", t.shape, t.dtype, c.chunk, apart and is_expert(canonical(name)))
        for c in chunks
        for name, t in c.tensors.items()
        if is_parameter(name)
    ]
    saved = file.root["optimizer"]
    parts = saved if isinstance(saved, list) else [saved]
    groups: list[object] = []
    for part in parts:
        inner = _inner(file, part)
        groups += [_group(g, inner.get("state")) for g in inner.get("param_groups", ())]
    beside = file.path.parent / DISTRIBUTED
    if beside.is_file():
        return groups, _distributed(beside, params)
    source = FileSource.of(file.path)
    states: States = {}
    for part, own in zip(parts, _shares(file, params, len(parts)), strict=True):
        for state, tensors in _plain_states(file, part, own, source).items():
            states.setdefault(state, {}).update(tensors)
    return groups, states


def _inner(file: RankFile, part: object) -> Mapping[str, Any]:
    """The torch optimizer's dict, unwrapped from the mixed-precision one."""
    if not isinstance(part, dict):
        raise UnsupportedError(f"{file.path}: optimizer is a {type(part).__name__}, not a dict")
    inner = part.get("optimizer", part)
    if not isinstance(inner, dict):
        raise UnsupportedError(f"{file.path}: optimizer is a {type(inner).__name__}, not a dict")
    return cast("Mapping[str, Any]", inner)


def _group(group: object, state: object) -> object:
    """Settings of a group; torch's own Adam counts steps per parameter, all alike.

    Its count is the true one: a group may carry that of an earlier load.
    """
    if not isinstance(group, dict):
        return {}
    found = plain({k: v for k, v in group.items() if k != "params"})
    slots = state.values() if isinstance(state, dict) else ()
    steps = (slot["step"] for slot in slots if isinstance(slot, dict) and "step" in slot)
    step = plain(next(steps, None))
    return found if step is None else {**found, "step": step}


def _shares(file: RankFile, params: list[Param], count: int) -> list[list[Param]]:
    """Parameters of each chained optimizer: all, or dense ones and experts."""
    if count == 1:
        return [params]
    if count == 2:
        return [[p for p in params if not p.expert], [p for p in params if p.expert]]
    raise UnsupportedError(f"{file.path}: {count} chained optimizers (expected dense and experts)")


# -- plain layouts -----------------------------------------------------------------------------


def _plain_states(file: RankFile, part: object, params: list[Param], source: FileSource) -> States:
    inner = _inner(file, part)
    groups = inner.get("param_groups")
    slots = inner.get("state")
    if not isinstance(groups, list) or not isinstance(slots, dict):
        raise UnsupportedError(
            f"{file.path}: no states in it, and no {DISTRIBUTED} beside it (the distributed "
            "optimizer's file is missing, or was written per data parallel rank)"
        )
    mains = cast("dict[str, Any]", part).get("fp32_from_fp16_params")
    states: States = {}
    for k, group in enumerate(groups):
        own = _members(file, params, group, groups)
        ids = group.get("params", [])
        if len(ids) != len(own):
            raise UnsupportedError(
                f"{file.path}: parameter group {k} has {len(ids)} entries, the model has "
                f"{len(own)} parameters of that kind"
            )
        for i, p in zip(ids, own, strict=True):
            slot = slots.get(i, {})
            for name in _MOMENTS:
                if isinstance(slot.get(name), StoredTensor):
                    states.setdefault(name, {})[p.name] = _checked(file, slot[name], p, source)
        halves = [p for p in own if p.dtype.itemsize == 2]
        if isinstance(mains, list):
            if k >= len(mains) or len(mains[k]) != len(halves):
                raise UnsupportedError(f"{file.path}: fp32 copies do not match parameter group {k}")
            for p, main in zip(halves, mains[k], strict=True):
                states.setdefault("master", {})[p.name] = _checked(file, main, p, source)
    return states


def _checked(file: RankFile, tensor: object, param: Param, source: FileSource) -> LazyTensor:
    if not isinstance(tensor, StoredTensor) or tensor.shape != param.shape:
        shape = tensor.shape if isinstance(tensor, StoredTensor) else type(tensor).__name__
        raise UnsupportedError(
            f"{file.path}: the optimizer holds {shape} where the order of the model's parameters "
            f"expects {param.name.split('/', 1)[1]} of shape {param.shape}"
        )
    return lazy(tensor, source)


def _members(
    file: RankFile, params: list[Param], group: object, groups: Sequence[object]
) -> list[Param]:
    """Parameters of one group, in order: Megatron splits by weight decay and by expert."""
    if not isinstance(group, dict):
        raise UnsupportedError(f"{file.path}: a parameter group is no dict")
    if len(groups) == 1:
        return params
    decayed = _decays(group)
    kinds = {g.get("is_expert_parallel", False) for g in groups if isinstance(g, dict)}
    expert = group.get("is_expert_parallel", False) if len(kinds) > 1 else None
    return [
        p
        for p in params
        if _wants_decay(file, p) == decayed and (expert is None or p.expert == expert)
    ]


def _decays(group: Mapping[str, Any]) -> bool:
    """Whether the group's weights decay (old files have no ``wd_mult``)."""
    return bool(group.get("wd_mult", group.get("weight_decay", 0.0)))


def _wants_decay(file: RankFile, param: Param) -> bool:
    """Megatron's default rule: no decay for biases and one-dimensional weights."""
    is_qk_norm = "q_layernorm" in param.name or "k_layernorm" in param.name
    if is_qk_norm and file.args.get("apply_wd_to_qk_layernorm"):
        return True
    return len(param.shape) > 1 and not param.name.endswith(".bias")


# -- the distributed optimizer's file ------------------------------------------------------------


def _distributed(path: Path, params: list[Param]) -> States:
    root = open_torch_file(path).root
    sections = root if isinstance(root, list) else [root]
    saved: list[Mapping[str, Any]] = []
    for section in sections:
        if not isinstance(section, dict) or not section.get("buckets_coalesced"):
            raise UnsupportedError(
                f"{path}: buckets are not coalesced (an old layout); convert it by resuming and "
                "saving once with a newer Megatron"
            )
        for index in sorted(k for k in section if type(k) is int):
            saved += [b for b in section[index].values() if isinstance(b, dict)]
    expected = buffers_of(params)
    if len(saved) != len(expected):
        raise UnsupportedError(f"{path}: has {len(saved)} buffers, the model needs {len(expected)}")
    source = FileSource.of(path)
    states: States = {}
    for buffer, own in zip(saved, expected, strict=True):
        end = max(stop for _, _, stop in spans_of(own))
        if buffer.get("numel_unpadded", end) != end:
            raise UnsupportedError(
                f"{path}: a buffer has {buffer['numel_unpadded']} elements, the model's parameters "
                f"in order need {end}"
            )
        for key, state in _STATES.items():
            flat = buffer.get(key)
            if not isinstance(flat, StoredTensor) or len(flat.shape) != 1 or flat.shape[0] < end:
                raise UnsupportedError(f"{path}: {key} is no flat buffer of {end} elements")
            states.setdefault(state, {}).update(unflatten(lazy(flat, source), own))
    return states
