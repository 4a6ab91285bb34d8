"""State dicts that every rank saved with ``torch.save`` on its own.

Names: veRL ``model_world_size_<W>_rank_<R>.pt`` with ``optim_world_size_...``, accelerate
``pytorch_model_fsdp_<i>_rank<R>.bin`` with ``optimizer_<i>_rank<R>.bin``, home-made
``..._rank<R>`` and pipeline ``..._stage<S>``. The tensors are DTensors (FSDP2, TP), ShardedTensors
(FSDP1) or plain: equal names on several ranks are then replicas, names on one rank only belong to
its stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import FormatError, LayoutError
from ..checkpoint import Checkpoint
from ..chunk_union import unite
from ..chunked import Chunked
from ..coverage import prove
from ..dtensor import is_sharded, local_part, writer_rank
from ..fsdp1_flat import is_flat, unflatten
from ..layout import Layout
from ..placement import Placement, Shard
from ..records import Record, StoredTensor
from ..registry import Format, OpenOptions
from ..source import FileSource
from ..state_checkpoint import as_lazy, build_checkpoint, model_files
from ..state_naming import name_parameters
from ..state_tree import KeyPath, OptimizerTree, StateTree, dotted, examine
from ..tensor import LazyTensor
from ..torchfile import open_torch_file

_RANK_FILE = re.compile(
    r"^(?P<stem>.*?)[_.-]?(?:world[_-]?size[_-]?(?P<world>\d+)[_-])?"
    r"(?P<kind>rank|stage)[_-]?(?P<rank>\d+)\.(?:pt|pth|bin|ckpt)$"
)
_NOT_MODEL = re.compile(r"^(?:optim|extra_state|rng|sched|random|dataloader|scaler|.*zero_pp)")
_THREADS = 4
_MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class _Group:
    """Files with one stem, by rank."""

    stem: str
    world: int | None
    files: Mapping[int, Path]


def detect(path: Path) -> Path | None:
    """Return the folder of rank files."""
    folder = path.parent if path.is_file() else path
    if path.is_file() and not _RANK_FILE.match(path.name):
        return None
    return folder if any(not _NOT_MODEL.match(g.stem) for g in _groups(folder)) else None


def _groups(folder: Path) -> list[_Group]:
    found: dict[tuple[str, int | None], dict[int, Path]] = {}
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError:
        return []
    for name in names:
        if m := _RANK_FILE.match(name):
            world = int(m["world"]) if m["world"] else None
            found.setdefault((m["stem"], world), {})[int(m["rank"])] = folder / name
    return [_Group(stem, world, files) for (stem, world), files in found.items()]


def open_torch_ranks(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a folder of rank files.

    Raises:
        FormatError: rank files missing, swapped, damaged or of several world sizes; holes.
        LayoutError: plain tensors with different shapes under one name.
        UnsupportedError: FSDP1 local (flat) state dicts of unknown models, pending sums.
    """
    group = _model_group(root)
    optimizer = next(
        (g for g in _groups(root) if g.stem.startswith("optim") and _belong(g, group)), None
    )
    trees = _rank_trees(group)
    if optimizer is not None:
        _demand_all(root, optimizer, max(group.files) + 1)
        beside = _rank_trees(optimizer, optimizer=True)
        trees = [
            replace(t, optimizers=(*t.optimizers, *o.optimizers))
            for t, o in zip(trees, beside, strict=True)
        ]
    trees = [_name_numbers(t) for t in trees]
    weights, copies = _merge([t.weights for t in trees])
    notes: tuple[str, ...] = ()
    if any(is_flat(n) for n in weights):
        config = model_files(root, options)[0]
        weights, copies, note = _unflattened(weights, copies, root, len(trees), config)
        notes = (note,)
    merged = replace(trees[0], weights=weights, optimizers=_merge_optimizers(trees))
    checkpoint = build_checkpoint(
        root,
        "torch_ranks",
        merged,
        options,
        layout=_layout(weights),
        placements={n: p for n, t in weights.items() if (p := _placement(t))},
        replicas=copies,
        warnings=notes,
    )
    prove(checkpoint.weights, root)
    for state, states in checkpoint.optimizer.items():
        prove(states, f"{root}: optimizer state {state}")
    return checkpoint


def _belong(optimizer: _Group, model: _Group) -> bool:
    index = re.search(r"\d*$", model.stem.rstrip("_-."))
    own = re.search(r"\d*$", optimizer.stem.rstrip("_-."))
    return optimizer.world == model.world and (index and index[0]) == (own and own[0])


def _model_group(root: Path) -> _Group:
    groups = [g for g in _groups(root) if not _NOT_MODEL.match(g.stem)]
    if len(groups) > 1:
        listed = ", ".join(f"{len(g.files)} x {next(iter(g.files.values())).name}" for g in groups)
        raise FormatError(f"{root}: rank files of several saves or world sizes are mixed: {listed}")
    group = groups[0]
    _demand_all(root, group, group.world or max(group.files) + 1)
    return group


def _demand_all(root: Path, group: _Group, world: int) -> None:
    """Refuse a group with missing ranks (world sizes are bounded by what is there)."""
    if len(group.files) == world and max(group.files) == world - 1:
        return
    first = next(iter(group.files.values())).name
    missing = [r for r in range(min(world, 100_000)) if r not in group.files]
    listed = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
    raise FormatError(
        f"{root}: {len(group.files)} rank files like {first}, {world} ranks are expected; missing: "
        f"{listed or 'none, there are too many'}"
    )


# -- one rank -------------------------------------------------------------------------------------


def _rank_trees(group: _Group, *, optimizer: bool = False) -> list[StateTree]:
    ranks = sorted(group.files)
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda r: _rank_tree(group.files[r], r, optimizer), ranks))


def _rank_tree(path: Path, rank: int, optimizer: bool) -> StateTree:
    root = open_torch_file(path).root
    if not isinstance(root, dict):
        raise FormatError(f"{path}: holds a {type(root).__name__}, not a state dict")
    whole = _localize(root, path, rank, FileSource.of(path))
    assert isinstance(whole, dict)
    tree = examine({"optimizer": whole} if optimizer else whole)
    if not optimizer and not tree.weights:
        raise FormatError(f"{path}: holds no tensors that could be model weights")
    return tree


def _localize(node: object, path: Path, rank: int, source: FileSource, at: KeyPath = ()) -> object:
    """Replace distributed tensors by whole shapes that have this rank's chunks only."""
    if len(at) > _MAX_DEPTH:
        return node
    if isinstance(node, dict):
        return {k: _localize(v, path, rank, source, (*at, k)) for k, v in node.items()}
    if isinstance(node, (list, tuple)) and any(isinstance(v, (dict, Record)) for v in node):
        return [_localize(v, path, rank, source, (*at, k)) for k, v in enumerate(node)]
    if type(node) is Record and is_sharded(node):
        writer = writer_rank(node)
        if writer is not None and writer != rank:
            raise FormatError(
                f"{path}: was written by rank {writer}, but its name says rank {rank}: files were "
                "swapped or renamed"
            )
        return local_part(node, dotted(at), source)
    return node


def _name_numbers(tree: StateTree) -> StateTree:
    """Give numbered optimizer states their names while the rank's own model is at hand."""
    shapes = {n: t.shape for n, t in tree.weights.items()}
    named = []
    for optimizer in tree.optimizers:
        numbered = any(isinstance(k, int) for k in optimizer.states)
        table, lost = name_parameters(optimizer, shapes, {}) if numbered else ({}, [])
        if not table or lost:
            named.append(optimizer)
            continue
        states: dict[object, Mapping[str, object]] = {
            table[k]: s for k, s in optimizer.states.items()
        }
        groups = tuple(
            {**g, "params": [table.get(p, p) for p in _params(g)]} for g in optimizer.groups
        )
        named.append(OptimizerTree(optimizer.path, states, groups))
    return replace(tree, optimizers=tuple(named))


def _params(group: Mapping[object, object]) -> Sequence[object]:
    params = group.get("params")
    known = params if isinstance(params, (list, tuple)) else ()
    if not all(isinstance(p, (int, str)) for p in known):
        raise FormatError("an optimizer's parameter group lists what is no parameter: damaged file")
    return known


# -- all ranks ------------------------------------------------------------------------------------

Leaves = Mapping[str, LazyTensor | StoredTensor]


def _merge(
    ranks: Sequence[Leaves],
) -> tuple[dict[str, LazyTensor], dict[str, tuple[LazyTensor, ...]]]:
    """Return the tensors of all ranks, and the copies of replicated ones."""
    parts: dict[str, list[LazyTensor | StoredTensor]] = {}
    for leaves in ranks:
        for name, leaf in leaves.items():
            parts.setdefault(name, []).append(leaf)
    merged: dict[str, LazyTensor] = {}
    copies: dict[str, tuple[LazyTensor, ...]] = {}
    for name, found in parts.items():
        merged[name], more = _join(name, found)
        if more:
            copies[name] = more
    return merged, copies


def _unflattened(
    weights: Mapping[str, LazyTensor],
    copies: Mapping[str, tuple[LazyTensor, ...]],
    root: Path,
    world: int,
    config: Mapping[str, Any] | None,
) -> tuple[dict[str, LazyTensor], dict[str, tuple[LazyTensor, ...]], str]:
    """Cut FSDP1's vectors, and their copies in the same way; also return the assumption made."""
    cut, note = unflatten(weights, root, world, config)
    found = {n: c for n, c in copies.items() if not is_flat(n)}
    vectors = {n: c for n, c in copies.items() if is_flat(n)}
    for k in range(max(map(len, vectors.values()), default=0)):
        held = {n: c[k] for n, c in vectors.items() if k < len(c)}
        more, _ = unflatten({**weights, **held}, root, world, config)
        for name, tensor in more.items():
            if name not in weights and list(tensor.spans()) != list(cut[name].spans()):
                found[name] = (*found.get(name, ()), tensor)
    return cut, found, note


def _join(
    name: str, parts: Sequence[LazyTensor | StoredTensor]
) -> tuple[LazyTensor, tuple[LazyTensor, ...]]:
    first = parts[0]
    for p in parts:
        if (p.shape, p.dtype) != (first.shape, first.dtype):
            raise LayoutError(
                f"{name!r} is {first.dtype} {first.shape} on one rank and {p.dtype} {p.shape} on "
                "another: plain tensors that were cut by hand, or files of different saves"
            )
    chunked = [p for p in parts if isinstance(p, Chunked)]
    if len(chunked) == len(parts):
        return unite(first.shape, first.dtype, [c for p in chunked for c in p.chunks])
    if chunked:
        raise LayoutError(f"{name!r} is sharded on some ranks and plain on others")
    whole, *more = [as_lazy(p) for p in parts]
    return whole, tuple(more)


def _merge_optimizers(trees: Sequence[StateTree]) -> tuple[OptimizerTree, ...]:
    """Join the states of all ranks; groups with different parameters are joined by position."""
    merged = []
    for found in _by_path(trees):
        keys: dict[object, None] = dict.fromkeys(k for o in found for k in o.states)
        states = {}
        for key in keys:
            held = [o.states[key] for o in found if key in o.states]
            tensors, _ = _merge([_tensors(s) for s in held])
            states[key] = {**held[0], **tensors}
        flat = {k: v for o in reversed(found) for k, v in o.flat_groups.items()}
        merged.append(OptimizerTree(found[0].path, states, _merge_groups(found), flat))
    return tuple(merged)


def _by_path(trees: Sequence[StateTree]) -> Iterator[list[OptimizerTree]]:
    for path in dict.fromkeys(o.path for t in trees for o in t.optimizers):
        yield [o for t in trees for o in t.optimizers if o.path == path]


def _tensors(state: Mapping[str, object]) -> dict[str, LazyTensor | StoredTensor]:
    return {k: v for k, v in state.items() if isinstance(v, (LazyTensor, StoredTensor))}


def _merge_groups(found: Sequence[OptimizerTree]) -> tuple[Mapping[object, object], ...]:
    groups = []
    for i, first in enumerate(found[0].groups):
        same = [o.groups[i] for o in found if i < len(o.groups)]
        params = list(dict.fromkeys(p for g in same for p in _params(g)))
        groups.append({**first, "params": params})
    return tuple(groups)


def _layout(weights: Mapping[str, LazyTensor]) -> Layout:
    """Guess the mesh: cuts along dim 1 are tensor parallel."""
    tp = total = 1
    for tensor in weights.values():
        if isinstance(tensor, Chunked):
            sources = len({c.source.path for c in tensor.chunks})
            cut = [len({c.lo[d] for c in tensor.chunks}) for d in range(tensor.ndim)]
            tp = max([tp, *cut[1:]])
            total = max(total, sources)
    return Layout(format="torch_ranks", tp=tp, dp=total // tp if total % tp == 0 else total)


def _placement(tensor: LazyTensor) -> dict[str, Placement]:
    if not isinstance(tensor, Chunked):
        return {}
    cut = [d for d in range(tensor.ndim) if len({c.lo[d] for c in tensor.chunks}) > 1]
    return {f"mesh{d}" if len(cut) > 1 else "mesh": Shard(d) for d in cut}


FORMAT = Format("torch_ranks", "torch.save rank files", detect, open_torch_ranks, rank=70)
