"""One model-parallel rank: its weights and optimizer states, put together over data parallel.

Weights are the 16-bit ``module`` up to stage 2. Under stage 3 they are the fp32 masters, the frozen
fragments and the buffers. ``shared_params`` (or storage that two names share) tells tied weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import FormatError, UnsupportedError
from ..stored import identity, lazy
from ..tensor import LazyTensor
from . import autoep, zero0, zero3, zero12
from .experts import owners
from .fields import Shape
from .nvme import find_swapped
from .states import ModelState, OptimState
from .zero12 import States

LazyTensors = Mapping[str, LazyTensor]


@dataclass(slots=True)
class Part:
    """What one model-parallel rank holds.

    Attributes:
        weights: by name.
        optimizer: by state and name.
        tied: alias to owner.
        copies: further copies that must equal a weight.
        cut: names that are cut over data parallel ranks (stage 3).
        warnings: in plain words.
        scalars: hyper-parameters found on the way (stage 0).
    """

    weights: dict[str, LazyTensor] = field(default_factory=dict)
    optimizer: States = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    copies: dict[str, list[LazyTensor]] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    scalars: dict[str, Any] = field(default_factory=dict)


def group_shapes(
    model: ModelState, optims: Sequence[OptimState], weights: Mapping[str, LazyTensor]
) -> list[dict[str, Shape]]:
    """Return the parameters of each group (stage 3: sub-group) in flat order.

    Raises:
        FormatError: the model file does not list them, or as many groups as the optimizer has.
    """
    groups = model.groups
    if groups is None:
        groups = _shapes_from_slices(model, optims, weights)
    want = len(optims[0].masters)
    chosen = list(groups) if len(groups) == want else [g for g in groups if g]
    if len(chosen) != want:
        raise FormatError(
            f"{model.path}: param_shapes has {len(groups)} groups, the optimizer in "
            f"{optims[0].path.name} has {want}: the files are of different models or saves"
        )
    return chosen


def _shapes_from_slices(
    model: ModelState, optims: Sequence[OptimState], weights: Mapping[str, LazyTensor]
) -> tuple[dict[str, Shape], ...]:
    """Old files without ``param_shapes``: the order of the mapping, the shapes of the weights."""
    tables: list[dict[str, Shape]] = [{} for _ in optims[0].masters]
    for rank in optims:
        for group, table in zip(rank.slices or (), tables, strict=False):
            for name in group:
                if name not in weights:
                    raise FormatError(
                        f"{model.path}: has no param_shapes, and no weight {name!r} to learn the "
                        "shape from: the optimizer cannot be taken apart"
                    )
                table[name] = weights[name].shape
    if not any(tables):
        raise FormatError(f"{model.path}: has no param_shapes: the optimizer cannot be taken apart")
    return tuple(tables)


def low_stage(model: ModelState, optims: Sequence[OptimState], experts: LazyTensors) -> Part:
    """Return the part of a stage 0 to 2 rank whose weights are in ``module`` and expert files."""
    part = Part()
    read_module(part, model)
    for alias, owner in autoep.router_aliases(part.weights, autoep.local_experts(model)).items():
        part.copies.setdefault(owner, []).append(part.weights.pop(alias))
        part.tied[alias] = owner
    part.weights.update(experts)
    if optims:
        add_zero12(part, model, optims)
        check_weights(model, part)
    else:
        part.optimizer, part.scalars, notes = zero0.read_optimizer(model, part.weights)
        part.warnings += notes
    _frozen_copies(part, model, optims)
    return part


def add_zero12(part: Part, model: ModelState, optims: Sequence[OptimState]) -> None:
    """Add the optimizer states of a stage 1 or 2 rank."""
    reorder, fused = registration_order(model), autoep.local_experts(model)
    for k, table in enumerate(group_shapes(model, optims, part.weights)):
        for owner in owners(k, table, optims, model) if table else ():
            group = zero12.make_group(k, table, owner.ranks)
            for state, tensors in zero12.read_group(group, reorder).items():
                named = {owner.names[n]: t for n, t in tensors.items()}
                named = autoep.unfused(named, owner.ep_rank, fused)
                part.optimizer.setdefault(state, {}).update(named)


def registration_order(model: ModelState) -> zero12.Reorder | None:
    """With round-robin gradients, the order in which the model registers its parameters."""
    zero = model.config.get("zero_optimization")
    if not (isinstance(zero, dict) and zero.get("round_robin_gradients")):
        return None
    place = {name: k for k, name in enumerate(model.module or {})}
    return lambda shapes: sorted(shapes, key=lambda n: place.get(n, len(place)))


def read_module(part: Part, model: ModelState) -> None:
    """Add the weights and buffers of ``module``; aliases go to ``tied``."""
    owned: dict[tuple[object, ...], str] = {}
    module = model.module or {}
    for name, stored in module.items():
        owner = model.shared.get(name)
        if owner is None and stored.numel:
            owner = owned.setdefault(identity(stored), name)
        if owner is not None and owner != name and owner in module:
            part.tied[name] = owner
        else:
            part.weights[name] = lazy(stored, model.source)


def check_weights(model: ModelState, part: Part) -> None:
    """Check that every trained parameter is among the weights with the same shape.

    Raises:
        FormatError: it is not.
    """
    for name, master in part.optimizer.get("master", {}).items():
        weight = part.weights.get(part.tied.get(name, name))
        if weight is None or weight.shape != master.shape:
            found = "absent" if weight is None else f"of shape {weight.shape}"
            raise FormatError(
                f"{model.path}: the optimizer has {name!r} of shape {master.shape}, among the "
                f"weights it is {found}: the file is damaged or not whole"
            )


def _frozen_copies(part: Part, model: ModelState, optims: Sequence[OptimState]) -> None:
    """Stage 2 saves frozen parameters twice; a save without them says nothing about it."""
    for name, stored in (model.frozen or {}).items():
        weight = part.weights.get(name)
        if weight is None:
            part.weights[name] = lazy(stored, model.source)
        elif stored.shape == weight.shape:
            part.copies.setdefault(name, []).append(lazy(stored, model.source))
    if optims and optims[0].stage == 2:
        _note_excluded(part, model)


def _note_excluded(part: Part, model: ModelState) -> None:
    keys = model.fields.data.keys()
    if model.frozen is None and "frozen_param_fragments" in keys:
        part.warnings.append(
            "saved with exclude_frozen_parameters: frozen weights, if the model has any, are not "
            "in this checkpoint; they are those of the base model"
        )


def stage3(models: Sequence[ModelState], optims: Sequence[OptimState], mp_world: int = 1) -> Part:
    """Return the part of a stage 3 rank, one of ``mp_world`` model-parallel ones."""
    first, part = models[0], Part()
    if autoep.local_experts(first):
        raise UnsupportedError(
            f"{first.path}: AutoEP with ZeRO-3 (experts cut over other ranks than the rest) cannot "
            "be read; convert it with DeepSpeed's ds_to_universal first"
        )
    zero3.check_ranks(optims)
    for m in models[1:]:
        if m.groups != first.groups or m.frozen_shapes != first.frozen_shapes:
            raise FormatError(
                f"{m.path}: its parameters differ from those of {first.path.name}: files of "
                "different models or saves are mixed"
            )
    groups = group_shapes(first, optims, {})
    lengths = [zero3.rank_length(table, len(optims)) for table in groups]
    swapped = find_swapped(first, groups, lengths, optims, mp_world)
    for k, table in enumerate(groups):
        states = zero3.read_subgroup(k, table, optims, swapped) if table else {}
        for state, tensors in states.items():
            part.optimizer.setdefault(state, {}).update(tensors)
    masters = part.optimizer.get("master", {})
    frozen = zero3.read_frozen(models)
    part.cut = {*masters, *frozen}
    sharded = {**masters, **frozen}
    for name, stored in (first.module or {}).items():
        owner = first.shared.get(name, name)
        if name in sharded:
            part.weights[name] = sharded[name]
        elif owner in sharded:
            part.tied[name] = owner
        elif name in first.buffers:
            part.weights[name] = lazy(stored, first.source)
        else:
            part.warnings.append(
                f"{name}: the save has a placeholder of it and no data (a tied weight whose owner "
                "an old DeepSpeed did not note down, or an unused parameter)"
            )
    part.weights.update({n: t for n, t in sharded.items() if n not in part.weights})
    _note_excluded(part, first)
    return part
