"""Find the model and the optimizer in whatever nesting a training script saved.

A script may save ``model.state_dict()`` itself, ``{"model": ..., "optimizer": ..., "step": ...}``,
Lightning's ``state_dict`` and ``optimizer_states``, torchtitan's weights beside a flattened
optimizer, and so on. The tree comes from a ``torch.save`` file or from the paths of a DCP
checkpoint; its leaves are tensors, plain values, or ``Deferred`` values that are read when asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from .records import StoredTensor
from .tensor import LazyTensor

Tree = Mapping[object, object]
Leaf = LazyTensor | StoredTensor
KeyPath = tuple[object, ...]

_CONTAINERS = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "generator",
    "student",
    "teacher",
    "ema",
    "model_ema",
    "ema_model",
    "ema_state_dict",
)
_COUNTERS = ("step", "global_step", "iteration", "iter", "trained_steps", "num_steps", "steps")
_NOT_WEIGHTS = frozenset((*_COUNTERS, "epoch", "best_loss", "loss"))
OPTIMIZER_ROOTS = ("optim", "optimizer")
_OTHER_ROOTS = ("train_state", "lr_scheduler", "dataloader")
_MAX_DEPTH = 6
_MAX_PATH = 32
_MAX_LIST = 64


@dataclass(frozen=True, slots=True)
class Deferred:
    """A value in a file that is read when somebody wants it."""

    read: Callable[[], object]


@dataclass(frozen=True, slots=True)
class OptimizerTree:
    """One optimizer: ``states`` {parameter key: {state name: leaf}} and its parameter groups.

    ``flat_groups`` has {parameter: {setting: value}} where groups were flattened to parameters.
    """

    path: KeyPath
    states: Mapping[object, Mapping[str, object]]
    groups: tuple[Tree, ...] = ()
    flat_groups: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StateTree:
    """What was found.

    Attributes:
        container: path of the dict that holds the weights, ``()`` for the root.
        weights: its tensors, by name within it.
        opaque: names in it whose values are no tensors.
        others: further containers (dotted path, number of tensors), largest first.
        optimizers: in tree order.
        rest: all other entries by path: settings, schedules, counters.
    """

    container: KeyPath
    weights: Mapping[str, Leaf]
    opaque: Mapping[str, object]
    others: tuple[tuple[str, int], ...]
    optimizers: tuple[OptimizerTree, ...]
    rest: Mapping[KeyPath, object]


def is_tensor(value: object) -> bool:
    """Whether a leaf is a tensor, read or not."""
    return isinstance(value, (LazyTensor, StoredTensor))


def nest(flat: Mapping[KeyPath, object]) -> dict[object, object]:
    """Return the nested dict of values by path (lists become dicts keyed by index).

    A path that runs through another value, or is absurdly long, is joined with dots and kept in the
    root.
    """
    root: dict[object, object] = {}
    for path, value in flat.items():
        node: Any = root if len(path) <= _MAX_PATH else None
        for key in path[:-1] if node is not None else ():
            node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if isinstance(node, dict) and path[-1] not in node:
            node[path[-1]] = value
        else:
            root[dotted(path)] = value
    return root


def guess_paths(keys: Iterable[str]) -> dict[str, KeyPath]:
    """Return paths for flat keys that come without: roots are told by their usual names."""
    names = list(keys)
    first = {n.partition(".")[0] for n in names}
    roots = {r for r in first if r in OPTIMIZER_ROOTS or r in _OTHER_ROOTS}
    model = [n for n in names if n.partition(".")[0] not in roots]
    inner = [n.removeprefix("model.") for n in model]
    if all(n.startswith("model.") for n in model) and any(
        n.startswith(("model.", "lm_head.")) for n in inner
    ):
        roots.add("model")
    paths: dict[str, KeyPath] = {}
    for n in names:
        root, _, rest = n.partition(".")
        paths[n] = (root, rest) if root in roots and rest else (n,)
    return paths


def dotted(path: KeyPath) -> str:
    """Join a path for people."""
    return ".".join(str(p) for p in path)


def examine(root: Tree) -> StateTree:
    """Find the container with most tensors, the optimizers, and the rest."""
    scan = _Scan()
    scan.visit((), _apart(root))
    if not scan.candidates:
        return StateTree((), {}, {}, (), tuple(scan.optimizers), scan.leftovers(None))
    ranked = sorted(scan.candidates.items(), key=lambda kv: _worth(kv[0], kv[1]), reverse=True)
    path, weights = ranked[0]
    opaque = {str(p[-1]): v for p, v in scan.values.items() if _belongs(p, path)}
    others = tuple((dotted(p), len(w)) for p, w in ranked[1:])
    return StateTree(path, weights, opaque, others, tuple(scan.optimizers), scan.leftovers(path))


def _apart(root: Tree) -> Tree:
    """Return the root with an optimizer that was flattened into it under a key of its own.

    ``dcp.save({**model, **optimizer})`` of states flattened by torch's ``get_state_dict`` leaves
    ``state.<weight>.exp_avg`` and ``param_groups.<weight>.lr`` beside the weights.
    """
    flat = {k for k in root if isinstance(k, str) and k.startswith(("state.", "param_groups."))}
    kinds = {k.partition(".")[0] for k in flat}
    if len(kinds) < 2 or "optimizer" in root:
        return root
    beside: dict[object, object] = {k: v for k, v in root.items() if k not in flat}
    return {**beside, "optimizer": {k: v for k, v in root.items() if k in flat}}


def _belongs(path: KeyPath, container: KeyPath | None) -> bool:
    """Whether a non-tensor lies among the weights; in the root only dotted names do."""
    if container is None or path[:-1] != container:
        return False
    return bool(container) or "." in str(path[-1])


def _worth(path: KeyPath, tensors: Mapping[str, Leaf]) -> tuple[int, int, int]:
    name = str(path[-1]) if path else ""
    known = _CONTAINERS.index(name) if name in _CONTAINERS else len(_CONTAINERS) // 2
    return len(tensors), -known, sum(prod(t.shape) for t in tensors.values())


class _Scan:
    """One walk over the tree."""

    def __init__(self) -> None:
        self.candidates: dict[KeyPath, dict[str, Leaf]] = {}
        self.optimizers: list[OptimizerTree] = []
        self.values: dict[KeyPath, object] = {}

    def visit(self, path: KeyPath, node: Tree) -> None:
        optimizer = _optimizer(path, node)
        if optimizer is not None:
            self.optimizers.append(optimizer)
            return
        if path and _is_module_tree(node):
            self.candidates[path] = dict(_leaves(node))
            return
        here: dict[str, Leaf] = {}
        for key, value in node.items():
            place = (*path, key)
            if not isinstance(value, (LazyTensor, StoredTensor)):
                self.descend(place, value)
            elif _is_weight(key, value):
                here[str(key)] = value
            else:
                self.values[place] = value
        if here:
            self.candidates[path] = here

    def descend(self, path: KeyPath, value: object) -> None:
        if len(path) < _MAX_DEPTH:
            if isinstance(value, Mapping) and value:
                self.visit(path, value)
                return
            if isinstance(value, (list, tuple)) and _has_dicts(value):
                for i, v in enumerate(value):
                    self.descend((*path, i), v)
                return
        self.values[path] = value

    def leftovers(self, container: KeyPath | None) -> dict[KeyPath, object]:
        return {p: v for p, v in self.values.items() if not _belongs(p, container)}


def _has_dicts(value: Sequence[object]) -> bool:
    return len(value) <= _MAX_LIST and any(isinstance(v, Mapping) for v in value)


def _is_weight(key: object, value: Leaf) -> bool:
    """A 0-d counter beside the weights is no weight."""
    return not (value.shape == () and str(key) in _NOT_WEIGHTS)


def _is_module_tree(node: Tree) -> bool:
    """Whether a dict with dicts below is one model: nothing but tensors, no container names."""
    if not any(isinstance(v, Mapping) for v in node.values()):
        return False
    pending: list[tuple[object, int]] = [(node, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, Mapping):
            if depth > 32 or any(
                k in _CONTAINERS and isinstance(v, Mapping) for k, v in value.items()
            ):
                return False
            pending += [(v, depth + 1) for v in value.values()]
        elif not is_tensor(value):
            return False
    return True


def _leaves(node: Tree, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, (LazyTensor, StoredTensor)):
            yield f"{prefix}{key}", value


# -- optimizers -----------------------------------------------------------------------------------


def _optimizer(path: KeyPath, node: Tree) -> OptimizerTree | None:
    """Return the optimizer that a dict is, or None."""
    states = node.get("state")
    groups = node.get("param_groups")
    if isinstance(states, Mapping) and (groups is not None or _named_optimizer(path)):
        by_key = {k: _state(v) for k, v in states.items() if isinstance(v, Mapping)}
        return OptimizerTree(path, by_key, _groups(groups))
    if not _named_optimizer(path):
        return None
    flat_states: dict[object, dict[str, object]] = {}
    flat_groups: dict[str, dict[str, object]] = {}
    for key, value in node.items():
        kind, _, name = str(key).partition(".")
        parameter, _, field_name = name.rpartition(".")
        if kind == "state" and parameter:
            flat_states.setdefault(parameter, {})[field_name] = value
        elif kind == "param_groups" and parameter:
            flat_groups.setdefault(parameter, {})[field_name] = value
    if not flat_states and not flat_groups:
        return None
    return OptimizerTree(path, flat_states, (), flat_groups)


def _named_optimizer(path: KeyPath) -> bool:
    return any(isinstance(p, str) and p.lower().startswith(("optim", "opt_")) for p in path)


def _state(value: Mapping[object, object]) -> dict[str, object]:
    return {str(k): v for k, v in value.items()}


def _groups(groups: object) -> tuple[Tree, ...]:
    if isinstance(groups, Mapping):  # a list that went through paths
        groups = [groups[k] for k in sorted(groups, key=_position)]
    if not isinstance(groups, (list, tuple)):
        return ()
    return tuple(g for g in groups if isinstance(g, Mapping))


def _position(key: object) -> tuple[int, str]:
    return (int(key), "") if str(key).isdigit() else (1 << 62, str(key))  # type: ignore[call-overload]  # digits


def find_step(tree: StateTree) -> object:
    """Return the leaf that counts steps: the optimizer's own first, else a counter; or None."""
    for optimizer in tree.optimizers:
        for state in optimizer.states.values():
            if "step" in state:
                return state["step"]
        for group in optimizer.groups:
            if "step" in group:
                return group["step"]
    for name in _COUNTERS:
        for path, value in tree.rest.items():
            if path[-1] == name:
                return value
    return None
