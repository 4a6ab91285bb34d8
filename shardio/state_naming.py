"""Which weight an optimizer state belongs to.

torch optimizers number their parameters in the order of ``param_groups``; FSDP, DCP and flattened
state dicts use names, with wrapper prefixes of their own. A numbering is accepted only when every
state has the shape of its weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from .names import strip_wrappers
from .state_tree import OptimizerTree, is_tensor

Shapes = Mapping[str, tuple[int, ...]]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "inv_freq", "position_ids")
_NO_DECAY = ("bias", "norm.weight", "layernorm.weight", "ln_f.weight", "ln_1.weight", "ln_2.weight")


def name_parameters(
    optimizer: OptimizerTree, shapes: Shapes, aliases: Mapping[str, str]
) -> tuple[dict[object, str], list[object]]:
    """Return ({key of the optimizer: weight name}, keys that have no certain name).

    Args:
        optimizer: its states and groups.
        shapes: of the weights, in the model's order, under their final names.
        aliases: tied name to owner.
    """
    keys = list(dict.fromkeys([*optimizer.states, *_group_keys(optimizer)]))
    if not any(_is_number(k) for k in keys):
        return _by_name(keys, shapes, aliases)
    named = _by_param_names(optimizer)
    if named:
        table, lost = _by_name(list(named.values()), shapes, aliases)
        return {k: table[n] for k, n in named.items() if n in table}, [
            k for k, n in named.items() if n in lost
        ]
    numbers = _numbering(optimizer, keys)
    orders = list(_orders(shapes, optimizer))
    for order in orders:
        if len(order) == len(numbers) and _fits(
            optimizer, dict(zip(numbers, order, strict=True)), shapes
        ):
            return dict(zip(numbers, order, strict=True)), []
    for order in orders:
        only = _only_choice(order, [_shape(optimizer, k) for k in numbers], shapes)
        if only is not None:
            return dict(zip(numbers, only, strict=True)), []
    return {}, keys


def _group_keys(optimizer: OptimizerTree) -> Iterator[object]:
    yield from optimizer.flat_groups
    for group in optimizer.groups:
        params = group.get("params")
        if isinstance(params, (list, tuple)):
            yield from params


def _is_number(key: object) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.isdigit())


def _by_name(
    keys: Iterable[object], shapes: Shapes, aliases: Mapping[str, str]
) -> tuple[dict[object, str], list[object]]:
    """Match names after stripping wrappers; a single outer prefix may differ from the weights'."""
    table: dict[object, str] = {}
    lost = []
    for key in keys:
        bare = strip_wrappers(str(key))
        tail = bare.partition(".")[2]
        for name in (bare, tail, f"model.{bare}"):
            owner = aliases.get(name, name)
            if owner in shapes:
                table[key] = owner
                break
        else:
            lost.append(key)
    return table, lost


def _by_param_names(optimizer: OptimizerTree) -> dict[object, str]:
    """The names torch >= 2.6 keeps in a group when the optimizer was given named parameters."""
    table: dict[object, str] = {}
    for group in optimizer.groups:
        params, names = group.get("params"), group.get("param_names")
        if not isinstance(params, (list, tuple)) or not isinstance(names, (list, tuple)):
            return {}
        if len(params) != len(names) or not all(isinstance(n, str) for n in names):
            return {}
        table.update(zip(params, names, strict=True))
    return table


def _numbering(optimizer: OptimizerTree, keys: Sequence[object]) -> list[object]:
    """All parameter numbers in order; without usable groups, those that have a state."""
    listed = list(_group_keys(optimizer))
    numbers = listed or list(keys)
    if {type(k) for k in optimizer.states} == {str} and all(type(k) is int for k in numbers):
        numbers = [str(k) for k in numbers]
    return numbers


def _orders(shapes: Shapes, optimizer: OptimizerTree) -> Iterator[list[str]]:
    """Candidate parameter orders: the model's, without buffers, and split by weight decay."""
    names = list(shapes)
    yield names
    names = [n for n in names if not n.endswith(_BUFFERS)]
    yield names
    if len(optimizer.groups) == 2:
        decayed = [n for n in names if not n.endswith(_NO_DECAY)]
        yield [*decayed, *(n for n in names if n.endswith(_NO_DECAY))]
        wide = [n for n in names if len(shapes[n]) >= 2]
        narrow = [n for n in names if len(shapes[n]) < 2]
        yield [*wide, *narrow]
        yield [*narrow, *wide]


def _fits(optimizer: OptimizerTree, table: Mapping[object, str], shapes: Shapes) -> bool:
    seen = False
    for key, state in optimizer.states.items():
        name = table.get(key)
        if name is None:
            return False
        for value in state.values():
            if is_tensor(value) and value.shape != ():  # type: ignore[attr-defined]  # a tensor
                if value.shape != shapes[name]:  # type: ignore[attr-defined]  # a tensor
                    return False
                seen = True
    return seen


def _shape(optimizer: OptimizerTree, key: object) -> tuple[int, ...] | None:
    """The shape that all states of a parameter have; None where they differ or there are none."""
    state = optimizer.states.get(key, {})
    found = {v.shape for k, v in state.items() if is_tensor(v) and k != "step"}  # type: ignore[attr-defined]  # tensors
    return found.pop() if len(found) == 1 else None


def _only_choice(
    order: Sequence[str], wanted: Sequence[tuple[int, ...] | None], shapes: Shapes
) -> list[str] | None:
    """Return the names that the optimizer has, among buffers and frozen weights that it has not.

    Shapes must leave one choice: taking every name as early as possible and as late as possible has
    to give the same names.
    """
    first = _take(order, wanted, shapes)
    last = _take(order[::-1], wanted[::-1], shapes)
    return first if first is not None and last is not None and first == last[::-1] else None


def _take(
    order: Sequence[str], wanted: Sequence[tuple[int, ...] | None], shapes: Shapes
) -> list[str] | None:
    names = iter(order)
    taken = []
    for shape in wanted:
        name = next((n for n in names if shapes[n] == shape), None)
        if name is None:
            return None
        taken.append(name)
    return taken
