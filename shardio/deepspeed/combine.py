"""All model-parallel ranks together: pipeline stages joined, tensor-parallel parts merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import FormatError
from ..box import Index
from ..placement import Placement, Replicate, Shard
from ..tensor import LazyTensor
from . import neox
from .affine import Affine
from .experts import read_experts
from .fused import Average, Sum
from .grid import Grid
from .parts import Part, low_stage, stage3
from .pipeline import stages
from .states import ModelState, OptimState
from .tensor_parallel import Rules, merge, read_rules


@dataclass(slots=True)
class Whole:
    """The model in one piece.

    Attributes:
        part: weights, optimizer and notes.
        tp, pp: sizes.
        placements: how each weight is cut over tp.
        averaged: weights that are means or sums over ranks.
        trimmed: weights of which padding rows were dropped.
    """

    part: Part
    tp: int = 1
    pp: int = 1
    placements: dict[str, Placement] = field(default_factory=dict)
    averaged: list[str] = field(default_factory=list)
    trimmed: list[str] = field(default_factory=list)


def combine(grid: Grid, config: Mapping[str, Any] | None) -> Whole:
    """Put the whole model together.

    Args:
        grid: the opened rank files.
        config: the model's config.json, for checkpoints that do not say how they are cut.

    Raises:
        FormatError, LayoutError, UnsupportedError: parts that are missing or do not fit.
    """
    tp, pp = _sizes(grid)
    if grid.folder.layers:
        parts = stages(grid, tp)
    elif pp > 1 or grid.first.module is None:
        raise FormatError(
            f"{grid.folder.path}: the weights are in layer_XX-model_states.pt files, and there "
            "are none; copy them from the nodes that wrote them"
        )
    else:
        parts = [_rank(grid, mp) for mp in range(tp)]
    rules = rules_of(grid.first, grid.optims[0], config)
    if tp == 1:
        return _unpadded(Whole(parts[0], tp, pp), rules)
    if neox.is_neox(parts[0].weights):
        settings = neox.read_settings(grid.folder.path, grid.first.fields.plain("args"), config)
        rules = replace(rules, hints={"neox": settings})
    return merged(parts, rules, tp, pp)


def _rank(grid: Grid, mp: int) -> Part:
    models, optims = grid.models[mp], grid.optims[mp]
    if grid.folder.shards:
        return stage3(models, optims, len(grid.models))
    return low_stage(models[0], optims, read_experts(grid.folder, mp, models[0]))


def _sizes(grid: Grid) -> tuple[int, int]:
    """Return (tp, pp); mp ranks are numbered stage * tp + tensor rank."""
    world = len(grid.models)
    known = grid.first.fields.plain("checkpoint_parallel_dimensions")
    tp = known.get("tp_degree") if isinstance(known, dict) else None
    if type(tp) is not int or tp < 1:
        tp = 1 + max((t for _, t in grid.folder.layers), default=world - 1)
    if world % tp:
        raise FormatError(
            f"{grid.first.path}: {world} model-parallel ranks are no multiple of tensor-parallel "
            f"size {tp}"
        )
    return tp, world // tp


def rules_of(
    model: ModelState, optims: Sequence[OptimState] | None, config: Mapping[str, Any] | None
) -> Rules:
    """Return how the checkpoint says that it is cut over tensor-parallel ranks."""
    info = model.fields.plain("universal_checkpoint_info")
    if info is None and optims:
        info = optims[0].fields.plain("universal_checkpoint_info")
    args = model.fields.plain("args")
    known = args if isinstance(args, dict) else {}
    hints = {
        "vocab_size": (config or {}).get("vocab_size", known.get("padded_vocab_size")),
        "swiglu": bool(known.get("swiglu")),
    }
    return read_rules(info, str(model.path), hints)


def merged(parts: Sequence[Part], rules: Rules, tp: int, pp: int) -> Whole:
    """Merge tensor-parallel ranks.

    Raises:
        FormatError, LayoutError, UnsupportedError: parts that do not fit together.
    """
    first = parts[0]
    for k, p in enumerate(parts):
        if p.weights.keys() != first.weights.keys():
            odd = sorted(p.weights.keys() ^ first.weights.keys())[0]
            raise FormatError(
                f"{rules.source}: tensor-parallel ranks 0 and {k} do not hold the same tensors "
                f"({odd!r} is on one only)"
            )
    whole = Whole(
        Part(tied=first.tied, cut=first.cut, warnings=first.warnings, scalars=first.scalars), tp, pp
    )
    for state in first.optimizer:
        whole.part.optimizer[state] = {
            name: _tensor(name, [p.optimizer[state][name] for p in parts], rules, state)[0]
            for name in first.optimizer[state]
        }
    for name in first.weights:
        tensor, placement = _tensor(name, [p.weights[name] for p in parts], rules)
        if first.weights[name] is first.optimizer.get("master", {}).get(name):  # stage 3
            tensor = whole.part.optimizer["master"][name]
        whole.part.weights[name] = tensor
        whole.placements[name] = placement
        _note(whole, name, [p.weights[name] for p in parts], rules)
    _tell_trimmed(whole, rules)
    return whole


def _unpadded(whole: Whole, rules: Rules) -> Whole:
    """Drop the padding rows of a vocabulary that no tensor parallelism cut."""
    part = whole.part
    for tensors in (part.weights, *part.optimizer.values()):
        for name, tensor in tensors.items():
            rows = rules.rows(name)
            if rows is not None and tensor.ndim and tensor.shape[0] > rows:
                tensors[name] = tensor.slice([slice(0, rows)])
                if tensors is part.weights:
                    whole.trimmed.append(name)
    _tell_trimmed(whole, rules)
    return whole


def _tell_trimmed(whole: Whole, rules: Rules) -> None:
    if whole.trimmed:
        whole.part.warnings.append(
            f"the vocabulary is padded for tensor parallelism; {', '.join(whole.trimmed)} "
            f"{'has' if len(whole.trimmed) == 1 else 'have'} its {rules.vocab} real rows "
            "(original_vocab_size in the checkpoint)"
        )


def _tensor(
    name: str, parts: Sequence[LazyTensor], rules: Rules, state: str = "master"
) -> tuple[LazyTensor, Placement]:
    placement = rules.placement(name, [p.shape for p in parts])
    if isinstance(placement, Sum) and state != "master":
        placement = Average()  # the terms of a sum all have the gradient of the sum
    tensor = merge(placement, parts, f"{rules.source}: {name}")
    rows = rules.rows(name)
    if rows is not None and tensor.ndim and tensor.shape[0] > rows:
        tensor = tensor.slice([slice(0, rows)])
    return tensor, placement


def _note(whole: Whole, name: str, parts: Sequence[LazyTensor], rules: Rules) -> None:
    """Copies to compare, means of rounded weights, dropped rows."""
    placement = whole.placements[name]
    if isinstance(placement, Affine):
        whole.placements[name] = placement.simple() or placement
        placement = whole.placements[name]
    if isinstance(placement, Replicate):
        whole.part.copies[name] = list(parts[1:])
    if isinstance(placement, Average | Sum):
        # the model of the next run gets the rounded mean of the masters, not the mean of roundings
        master = whole.part.optimizer.get("master", {}).get(name)
        if master is not None:
            whole.part.weights[name] = master.cast(whole.part.weights[name].dtype)
        whole.averaged.append(name)
    full: Index = whole.part.weights[name].shape
    rows = sum(p.shape[0] for p in parts) if full else 0
    if isinstance(placement, Shard) and placement.dim == 0 and full[0] < rows:
        whole.trimmed.append(name)
