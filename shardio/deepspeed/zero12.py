"""ZeRO stages 1 and 2 (and BF16_Optimizer): one flat vector per parameter group, cut into equal
partitions.

Parameters follow each other in ``param_shapes`` order, perhaps with alignment gaps between them;
the end is padded to a multiple of 2 * partitions (NCCL wants 4-byte starts), of which masters may
be saved without. ``param_slice_mappings`` repeats the arithmetic per rank; it is what tells which
partition a file holds. After ``DeepSpeedZeroOptimizer`` in ``runtime/zero/stage_1_and_2.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ...errors import FormatError
from ..flat_buffer import FlatBuffer, Part
from ..records import StoredTensor
from ..tensor import LazyTensor
from .fields import Shape
from .states import OptimState

States = dict[str, dict[str, LazyTensor]]  # state name to tensors by parameter
Slices = Mapping[str, tuple[int, int]]
Reorder = Callable[[Mapping[str, Shape]], list[str]]


@dataclass(frozen=True, slots=True)
class Group:
    """One parameter group of one model-parallel rank.

    Attributes:
        index: position in the optimizer.
        shapes: parameters in flat order.
        starts: first element of each parameter.
        total: elements up to the end of the last parameter.
        ranks: the files that hold the partitions, in partition order.
    """

    index: int
    shapes: Mapping[str, Shape]
    starts: Mapping[str, int]
    total: int
    ranks: tuple[OptimState, ...]


def make_group(index: int, shapes: Mapping[str, Shape], ranks: Sequence[OptimState]) -> Group:
    """Lay out the parameters of a group.

    Raises:
        FormatError: the alignment gaps do not fit the parameters.
    """
    gaps = ranks[0].gaps[index] if ranks[0].gaps and index < len(ranks[0].gaps) else ()
    if gaps and len(gaps) != len(shapes):
        raise FormatError(
            f"{ranks[0].path}: group {index} has {len(gaps)} alignment paddings for "
            f"{len(shapes)} parameters"
        )
    starts, at = {}, 0
    for k, (name, shape) in enumerate(shapes.items()):
        starts[name] = at
        at += prod(shape) + (gaps[k] if gaps else 0)
    return Group(index, shapes, starts, at, tuple(ranks))


def read_group(group: Group, reorder: Reorder | None) -> States:
    """Return the masters and all other states of a group, by parameter.

    Args:
        group: the group.
        reorder: with ``round_robin_gradients``, gives the parameters in registration order, which
            is the (wrong) order that DeepSpeed then writes into ``param_slice_mappings``.

    Raises:
        FormatError: partition lengths or slice mappings that contradict the shapes.
    """
    vectors = {"master": [r.masters[group.index] for r in group.ranks]}
    for name in _state_names(group):
        vectors[name] = [_state(group, r, name) for r in group.ranks]
    size = _partition_size(group, vectors["master"])
    for name, parts in vectors.items():
        _check_lengths(group, name, parts, size)
    _check_slices(group, size, reorder)
    found: States = {}
    for name, parts in vectors.items():
        flat = FlatBuffer.of(
            [Part.of(p, r.source) for p, r in zip(parts, group.ranks, strict=True)]
        )
        found[name] = {p: flat.tensor(group.starts[p], shape) for p, shape in group.shapes.items()}
    return found


def _state_names(group: Group) -> list[str]:
    names: dict[str, None] = {}
    for r in group.ranks:
        names |= dict.fromkeys(r.states[group.index])
    return list(names)


def _state(group: Group, rank: OptimState, name: str) -> StoredTensor:
    stored = rank.states[group.index].get(name)
    if stored is not None:
        return stored
    master = rank.masters[group.index]
    if master.numel == 0:  # a partition that is padding only may have no state
        return master
    raise FormatError(
        f"{rank.path}: group {group.index} has no optimizer state {name!r}, other ranks have it: "
        "files of different saves are mixed"
    )


def partition_sizes(total: int, count: int) -> list[int]:
    """Return the partition length by the rule of DeepSpeed since 0.5, then by the older one."""
    return [-(-total // (factor * count)) * factor for factor in (2, 1)]


def _partition_size(group: Group, masters: Sequence[StoredTensor]) -> int:
    count = len(masters)
    for size in partition_sizes(group.total, count):
        if all(m.numel in _lengths(group.total, size, r) for r, m in enumerate(masters)):
            return size
    return partition_sizes(group.total, count)[0]


def _lengths(total: int, size: int, rank: int) -> tuple[int, int]:
    """Lengths a rank's part may have: padded, or without the padding at the end."""
    return size, max(0, min(size, total - rank * size))


def _check_lengths(group: Group, name: str, parts: Sequence[StoredTensor], size: int) -> None:
    for r, part in enumerate(parts):
        padded, lean = _lengths(group.total, size, r)
        if part.numel not in (padded, lean):
            either = str(padded) if padded == lean else f"{padded} (or {lean} without padding)"
            raise FormatError(
                f"{part.storage.path}: {name} of group {group.index} has {part.numel} elements, "
                f"expected {either}: {len(group.shapes)} parameters with {group.total} elements "
                f"over {len(parts)} partitions; the file belongs to another model or world size"
            )
        kinds = [(p.dtype, p.storage.big_endian) for p in (part, parts[0])]
        if part.numel and kinds[0] != kinds[1]:
            raise FormatError(
                f"{part.storage.path}: {name} of group {group.index} is {part.dtype}, that of the "
                f"first rank {parts[0].dtype}: files of different saves are mixed"
            )


def expected_slices(
    names: Sequence[str], group: Group, size: int
) -> list[dict[str, tuple[int, int]]]:
    """Return, for each partition, which part of which parameter it holds and where."""
    gap = {
        n: end - start - prod(group.shapes[n])
        for (n, start), end in zip(
            group.starts.items(), [*list(group.starts.values())[1:], group.total], strict=True
        )
    }
    tables: list[dict[str, tuple[int, int]]] = [{} for _ in group.ranks]
    at = 0
    for name in names:
        count = prod(group.shapes[name])
        first, last = at // size, (at + count - 1) // size if count else -1
        for r in range(first, min(last, len(tables) - 1) + 1):
            lo, hi = max(at, r * size), min(at + count, (r + 1) * size)
            tables[r][name] = (lo - r * size, hi - lo)
        at += count + gap[name]
    return tables


def _check_slices(group: Group, size: int, reorder: Reorder | None) -> None:
    """Compare the mapping in each file with the arithmetic: it says which partition that file is.

    Raises:
        FormatError: swapped files, or files of another model.
    """
    if size == 0 or any(r.slices is None or group.index >= len(r.slices) for r in group.ranks):
        return
    saved: list[Slices] = [r.slices[group.index] for r in group.ranks if r.slices is not None]
    orders = [list(group.shapes)]
    if reorder is not None:
        orders.append(reorder(group.shapes))
    for order in orders:
        tables = expected_slices(order, group, size)
        wrong = [k for k, (a, b) in enumerate(zip(saved, tables, strict=True)) if dict(a) != b]
        if not wrong:
            return
        k = wrong[0]
        other = next((j for j, t in enumerate(tables) if t and dict(saved[k]) == t), None)
        if other is not None:
            raise FormatError(
                f"{group.ranks[k].path}: holds partition {other} of group {group.index}, its name "
                f"says {k}: rank files were swapped or renamed"
            )
    if reorder is None:
        rank = group.ranks[wrong[0]]
        raise FormatError(
            f"{rank.path}: param_slice_mappings of group {group.index} contradicts the parameter "
            "shapes in the model file: the files are of different models or saves"
        )
