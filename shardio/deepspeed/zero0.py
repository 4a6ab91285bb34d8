"""Stage 0: the whole optimizer lies in the model file, without parameter names.

Three forms: a plain torch optimizer (fp32 training), one fp32 flat vector per group
(``FP16_Optimizer``), or lists of fp32 tensors per group (``FP16_UnfusedOptimizer``). Parameters
come in the order of the model within each group; which group a parameter is in must follow from
shapes, and where it does not, the optimizer is left out with a warning rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ..flat_buffer import FlatBuffer
from ..flat_buffer import Part as FlatPart
from ..records import StoredTensor
from ..stored import lazy, plain
from ..tensor import LazyTensor
from .fields import Fields, Shape
from .states import ModelState
from .zero12 import States

Grouped = list[dict[str, Shape]]
_NAMELESS = (
    "the optimizer saved without ZeRO has no parameter names, and shapes do not tell which state "
    "belongs to which parameter: only the weights are read"
)


def read_optimizer(
    model: ModelState, weights: Mapping[str, LazyTensor]
) -> tuple[States, dict[str, Any], list[str]]:
    """Return (states by parameter, scalars, warnings) of the optimizer in a model file.

    Raises:
        FormatError: malformed entries.
    """
    if model.fields.get("optimizer") is None:
        return {}, {}, []
    f = model.fields.sub("optimizer")
    inner = f.sub("optimizer_state_dict") if "optimizer_state_dict" in f.data else f
    table = inner.mapping("state") or {}
    settings = plain(inner.get("param_groups")) or []
    scalars: dict[str, Any] = {"param_groups": settings, "loss_scale": f.plain("cur_scale")}
    if "dynamic_loss_scale" in f.data:
        scaling = {k: f.plain(k) for k in ("cur_scale", "cur_iter", "scale_factor", "scale_window")}
        scalars["loss_scaler"] = {"dynamic": f.plain("dynamic_loss_scale"), **scaling}
    first = next((s for s in table.values() if isinstance(s, dict)), {})
    scalars["optimizer_steps"] = [plain(first.get("step"))]
    names = {n: w.shape for n, w in weights.items() if n not in model.buffers}
    reader = _Reader(model, f, table)
    flat = "fp32_groups_flat" in f.data
    states = reader.flat(names) if flat else reader.shaped(names, settings)
    if states is None:
        return {}, scalars, [_NAMELESS]
    if len(reader.groups) == len(settings):
        scalars["param_groups"] = [
            {**s, "params": list(g)} if isinstance(s, dict) else s
            for s, g in zip(settings, reader.groups, strict=True)
        ]
    return states, scalars, []


class _Reader:
    def __init__(self, model: ModelState, f: Fields, table: Mapping[Any, Any]) -> None:
        self.model = model
        self.f = f
        self.table = table
        self.groups: Grouped = []

    def flat(self, names: Mapping[str, Shape]) -> States | None:
        """One vector per group."""
        masters = [self.f.flat(t, "fp32_groups_flat") for t in self.f.items("fp32_groups_flat")]
        sizes = [m.numel for m in masters]
        listed = self._listed(names)
        if listed is None or [sum(map(prod, g.values())) for g in listed] != sizes:
            listed = None
        groups = listed or _split_by_size(names, sizes)
        if groups is None:
            return None
        self.groups = groups
        found: States = {}
        for k, (group, master) in enumerate(zip(groups, masters, strict=True)):
            vectors = {"master": master}
            for name, t in self._tensors(k).items():
                if t.shape == master.shape:
                    vectors[name] = self.f.flat(t, f"state[{k}].{name}")
            for state, t in vectors.items():
                flat, at = FlatBuffer.of([FlatPart.of(t, self.model.source)]), 0
                for name, shape in group.items():
                    found.setdefault(state, {})[name] = flat.tensor(at, shape)
                    at += prod(shape)
        return found

    def shaped(self, names: Mapping[str, Shape], settings: Sequence[Any]) -> States | None:
        """A tensor per parameter; a plain torch optimizer has the states only."""
        masters: list[list[StoredTensor]] = []
        for group in self.f.items("fp32_groups") if "fp32_groups" in self.f.data else ():
            tensors = group if isinstance(group, list) else [group]
            masters.append([t for t in tensors if type(t) is StoredTensor])
        shapes = [[t.shape for t in g] for g in masters] or self._state_shapes(settings)
        listed = self._listed(names)
        if listed is None or [len(g) for g in listed] != [len(s) for s in shapes]:
            listed = None
        groups = listed or _split_by_shape(names, shapes) or _without_frozen(names, shapes)
        if groups is None:
            return None
        self.groups = groups
        found: States = {}
        index = 0
        for g, group in enumerate(groups):
            for k, name in enumerate(group):
                if masters:
                    found.setdefault("master", {})[name] = lazy(masters[g][k], self.model.source)
                for state, t in self._tensors(index).items():
                    if t.shape == names[name]:
                        found.setdefault(state, {})[name] = lazy(t, self.model.source)
                index += 1
        return found

    def _listed(self, names: Mapping[str, Shape]) -> Grouped | None:
        """The groups that the file itself lists (mconv does, DeepSpeed does not)."""
        groups = self.model.groups
        if not groups or any(names.get(n) != s for g in groups for n, s in g.items()):
            return None
        return [dict(g) for g in groups]

    def _tensors(self, index: int) -> dict[str, StoredTensor]:
        state = self.table.get(index)
        return self.f.tensors(state, f"state[{index}]") if isinstance(state, dict) else {}

    def _state_shapes(self, settings: Sequence[Any]) -> list[list[Shape]]:
        found = []
        for group in settings:
            params = group.get("params") if isinstance(group, dict) else None
            shapes = []
            for index in params if isinstance(params, list) else ():
                tensors = [t for t in self._tensors(index).values() if t.shape != ()]
                shapes.append(tensors[0].shape if tensors else (-1,))
            found.append(shapes)
        return found


def _split_by_size(names: Mapping[str, Shape], sizes: Sequence[int]) -> Grouped | None:
    """Match parameters to flat vectors: one group, or matrices and vectors apart."""
    if len(sizes) == 1:
        candidates = [[dict(names)]]
    else:
        wide = {n: s for n, s in names.items() if len(s) > 1}
        slim = {n: s for n, s in names.items() if len(s) <= 1}
        candidates = [[wide, slim], [slim, wide]]
    for groups in candidates:
        if [sum(map(prod, g.values())) for g in groups] == list(sizes):
            return groups
    return None


def _split_by_shape(
    names: Mapping[str, Shape], shapes: Sequence[Sequence[Shape]]
) -> Grouped | None:
    """Deal the parameters, in model order, to the groups whose next shape fits.

    None when two groups would take the same parameter, or something is left over.
    """
    groups: Grouped = [{} for _ in shapes]
    for name, shape in names.items():
        takers = [
            k
            for k, g in enumerate(groups)
            if len(g) < len(shapes[k]) and shapes[k][len(g)] == shape
        ]
        if len(takers) != 1:
            return None
        groups[takers[0]][name] = shape
    full = all(len(g) == len(s) for g, s in zip(groups, shapes, strict=True))
    return groups if full else None


def _without_frozen(
    names: Mapping[str, Shape], shapes: Sequence[Sequence[Shape]]
) -> Grouped | None:
    """One group of fewer parameters than the model has: the others were frozen.

    None unless the shapes fit the model's order in one way only, that is, unless taking the first
    place that fits, from either end, gives the same.
    """
    if len(shapes) != 1:
        return None
    early = _first_fit(list(names), names, shapes[0])
    late = _first_fit(list(names)[::-1], names, shapes[0][::-1])
    return [{n: names[n] for n in early}] if early and early == late[::-1] else None


def _first_fit(
    order: Sequence[str], names: Mapping[str, Shape], shapes: Sequence[Shape]
) -> list[str]:
    """The first names, in order, that have the shapes one after the other; empty without a fit."""
    left = iter(order)
    found = [next((n for n in left if names[n] == shape), "") for shape in shapes]
    return found if all(found) else []
