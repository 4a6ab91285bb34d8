"""A checkpoint from an examined state dict: names stripped, optimizer named, ties found.

Shared by the readers of plain ``torch.save`` files, per-rank state dicts and DCP. Values that are
not tensors (parameter groups, schedules, settings) are read when somebody looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, UnsupportedError, counted
from .assets import CONFIG, around, find_assets, load_config, load_json
from .checkpoint import Checkpoint
from .layout import Layout
from .names import stripped
from .placement import Placement
from .records import Record, StoredTensor, exotic_kind
from .registry import OpenOptions
from .state_naming import name_parameters
from .state_tree import Deferred, KeyPath, Leaf, OptimizerTree, StateTree, dotted, find_step, nest
from .stored import identity, lazy, plain
from .tensor import LazyTensor

_EMBEDDINGS = (
    "model.embed_tokens.weight", "transformer.wte.weight", "embed_tokens.weight",
    "tok_embeddings.weight",
)  # fmt: skip
_SCHEDULES = ("scheduler", "lr_sched", "scaler")
_HEAD = "lm_head.weight"
_OLD_HEAD = "output.weight"  # Meta's and, long ago, torchtitan's
_MAX_DEPTH = 40


class LateMapping(Mapping[str, Any]):
    """A mapping that is computed when it is first looked at."""

    __slots__ = ("_data", "_make")

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = make
        self._data: Mapping[str, Any] | None = None

    def _get(self) -> Mapping[str, Any]:
        if self._data is None:
            self._data = self._make()
        return self._data

    def __getitem__(self, key: str) -> Any:
        return self._get()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._get())

    def __len__(self) -> int:
        return len(self._get())

    def __repr__(self) -> str:
        return repr(dict(self._get()))


def build_checkpoint(
    path: Path,
    format: str,
    tree: StateTree,
    options: OpenOptions,
    *,
    version: str | None = None,
    layout: Layout | None = None,
    placements: Mapping[str, Mapping[str, Placement]] | None = None,
    replicas: Mapping[str, Sequence[LazyTensor]] | None = None,
    warnings: Sequence[str] = (),
) -> Checkpoint:
    """Return the checkpoint of an examined tree.

    Args:
        path: what was opened; config and tokenizer are looked for around it.
        format: name of the format.
        tree: from ``examine``.
        options: the user's.
        placements, replicas: by the names of ``tree.weights``.

    Raises:
        FormatError: no weights.
        UnsupportedError: sparse or quantized torch tensors among the weights.
    """
    if not tree.weights:
        raise FormatError(f"{path}: holds no tensors that could be model weights")
    _refuse_exotic(path, tree)
    config, assets = model_files(path, options)
    names = _unwrapped(stripped(tree.weights))
    weights = {names[n]: t for n, t in tree.weights.items()}
    tied = shared_storages(weights)
    copies = {names[n]: tuple(c) for n, c in (replicas or {}).items() if c}
    lazies = {n: as_lazy(t) for n, t in weights.items() if n not in tied}
    lazies, tied, copies = tie_by_config(lazies, config, tied, copies)
    notes = [*warnings, *_notes(tree)]
    tables = _name_all(tree.optimizers, lazies, tied, notes)
    return Checkpoint(
        path=path,
        format=format,
        version=version,
        weights=lazies,
        optimizer=_optimizer_states(tree.optimizers, tables),
        step=_step(tree),
        config=config,
        args=LateMapping(lambda: _nested(tree, schedule=False)),
        scalars=LateMapping(lambda: _scalars(tree, tables)),
        layout=layout or Layout(format=format),
        placements={names[n]: p for n, p in (placements or {}).items() if names.get(n) in lazies},
        replicas=copies,
        tied=tied,
        assets=assets,
        warnings=tuple(notes),
    )


def optimizer_of(
    tree: StateTree,
    weights: Mapping[str, LazyTensor],
    tied: Mapping[str, str],
    notes: list[str],
) -> tuple[dict[str, dict[str, LazyTensor]], Mapping[str, Any], int | None]:
    """Return (states by weight name, scalars, step) of an optimizer that lies beside its model.

    Args:
        tree: the optimizer's.
        weights: the model's, in the order in which it registers them.
        tied: alias to owner.
        notes: what had to be left out is added here.
    """
    tables = _name_all(tree.optimizers, weights, tied, notes)
    states = _optimizer_states(tree.optimizers, tables)
    return states, LateMapping(lambda: _scalars(tree, tables)) if states else {}, _step(tree)


def model_files(
    path: Path, options: OpenOptions
) -> tuple[Mapping[str, Any] | None, tuple[Path, ...]]:
    """Return (config, assets) around a checkpoint; ``options.config`` comes first.

    Raises:
        ConfigError: an unreadable config.
    """
    folders = around(path)
    if options.config is not None:
        given = options.config
        folders.insert(0, given if given.is_dir() else given.parent)
    assets = find_assets(folders)
    if options.config is None or options.config.is_dir():
        return load_config(assets), assets
    config = load_json(options.config)
    if not isinstance(config, dict):
        raise ConfigError(f"{options.config}: expected a JSON object")
    return config, (options.config, *(a for a in assets if a.name != CONFIG))


def as_lazy(leaf: Leaf) -> LazyTensor:
    """Return the lazy tensor of either kind of leaf."""
    return lazy(leaf) if isinstance(leaf, StoredTensor) else leaf


def shared_storages(weights: Mapping[str, Leaf]) -> dict[str, str]:
    """Return {alias: owner} of names that view the very same bytes; the first name owns them."""
    owners: dict[object, str] = {}
    tied = {}
    for name, leaf in weights.items():
        if isinstance(leaf, StoredTensor) and leaf.numel:
            owner = owners.setdefault(identity(leaf), name)
            if owner != name:
                tied[name] = owner
    return tied


def tie_by_config(
    weights: Mapping[str, LazyTensor],
    config: Mapping[str, Any] | None,
    tied: Mapping[str, str],
    replicas: Mapping[str, tuple[LazyTensor, ...]],
) -> tuple[dict[str, LazyTensor], dict[str, str], dict[str, tuple[LazyTensor, ...]]]:
    """Where the config ties the head to the embedding, name the tie; a head that is there becomes a
    replica.

    Whether they are equal is checked when the replicas are compared.
    """
    kept, ties, copies = dict(weights), dict(tied), dict(replicas)
    owner = next((n for n in _EMBEDDINGS if n in kept), None)
    says_tied = config is not None and config.get("tie_word_embeddings") is True
    name = _OLD_HEAD if owner == _EMBEDDINGS[-1] and _HEAD not in kept else _HEAD
    if says_tied and owner and name in kept and kept[name].shape == kept[owner].shape:
        head = kept.pop(name)
        ties[name] = owner
        copies[owner] = (*copies.get(owner, ()), head, *copies.pop(name, ()))
    elif says_tied and owner in _EMBEDDINGS[:2] and _HEAD not in kept:
        ties.setdefault(_HEAD, owner)
    return kept, ties, copies


def _unwrapped(names: Mapping[str, str]) -> dict[str, str]:
    """Drop one ``model.`` that a wrapping module put before every name."""
    bare = list(names.values())
    if all(n.startswith("model.") for n in bare) and any(
        n.startswith("model.model.") for n in bare
    ):
        return {k: n.removeprefix("model.") for k, n in names.items()}
    return dict(names)


def _refuse_exotic(path: Path, tree: StateTree) -> None:
    for name, value in tree.opaque.items():
        kind = exotic_kind(value)
        if kind:
            raise UnsupportedError(f"{path}: {name!r} is {kind}, which mconv cannot read")


def _notes(tree: StateTree) -> list[str]:
    notes = []
    where = repr(dotted(tree.container)) if tree.container else "the top level"
    others = [(name, n) for name, n in tree.others if n > 1]
    if others:
        listed = ", ".join(f"{name or 'the top level'!s} ({n} tensors)" for name, n in others[:5])
        notes.append(
            f"weights are taken from {where} ({counted(len(tree.weights), 'tensor')}); "
            f"also there: {listed}"
        )
    extra = [n for n in tree.opaque if n.rpartition(".")[2].startswith("_extra_state")]
    if extra:
        notes.append(
            f"{len(extra)} opaque _extra_state entries are left out, the first: {extra[0]}"
        )
    other = sorted(
        n for n, v in tree.opaque.items() if isinstance(v, (Record, Deferred)) and n not in extra
    )
    if other:
        notes.append(
            f"no tensors, {counted(len(other), 'entry', 'entries')} "
            f"of {where}: {', '.join(other[:3])}"
        )
    return notes


# -- optimizer ------------------------------------------------------------------------------------


def _name_all(
    optimizers: Sequence[OptimizerTree],
    weights: Mapping[str, LazyTensor],
    tied: Mapping[str, str],
    notes: list[str],
) -> list[dict[object, str]]:
    shapes = {n: t.shape for n, t in weights.items()}
    tables = []
    for optimizer in optimizers:
        table, lost = name_parameters(optimizer, shapes, tied)
        lost = [k for k in lost if k in optimizer.states]
        if lost and table:
            notes.append(
                f"optimizer {dotted(optimizer.path)!r}: "
                f"{counted(len(lost), 'state')} of no weight left out, the first: {lost[0]}"
            )
        elif lost:
            notes.append(
                f"optimizer {dotted(optimizer.path)!r} is left out: its {len(lost)} parameters are "
                "numbered, and shapes do not tell with certainty which weights they are"
            )
        tables.append(table)
    return tables


def _optimizer_states(
    optimizers: Sequence[OptimizerTree], tables: Sequence[Mapping[object, str]]
) -> dict[str, dict[str, LazyTensor]]:
    found: dict[str, dict[str, LazyTensor]] = {}
    for optimizer, table in zip(optimizers, tables, strict=True):
        for key, state in optimizer.states.items():
            name = table.get(key)
            if name is None:
                continue
            for kind, leaf in state.items():
                if isinstance(leaf, (LazyTensor, StoredTensor)) and kind != "step":
                    found.setdefault(kind, {})[name] = as_lazy(leaf)
    return found


def _step(tree: StateTree) -> int | None:
    value = value_of(find_step(tree))
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return int(value) if isinstance(value, (int, float)) and value == int(value) else None


def value_of(leaf: object) -> Any:
    """Return a leaf as plain data, reading it if it is in a file."""
    if isinstance(leaf, Deferred):
        leaf = leaf.read()
    if isinstance(leaf, LazyTensor):
        return plain(leaf.read()) if leaf.size <= 4096 else f"<tensor {list(leaf.shape)}>"
    return plain(leaf)


def _values(node: object, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        return "<left out: nested too deeply>"
    if isinstance(node, Mapping):
        return {str(k): _values(v, depth + 1) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [_values(v, depth + 1) for v in node]
    return value_of(node)


def _scalars(tree: StateTree, tables: Sequence[Mapping[object, str]]) -> dict[str, Any]:
    groups = []
    for optimizer, table in zip(tree.optimizers, tables, strict=True):
        for group in optimizer.groups:
            settings = {
                str(k): _values(v) for k, v in group.items() if k not in ("params", "param_names")
            }
            params = _values(group.get("params")) or []
            by_text = {str(k): n for k, n in table.items()}
            names = [by_text[str(p)] for p in params if str(p) in by_text]
            groups.append({**settings, "params": names})
        groups += _regroup(optimizer.flat_groups, table)
    found: dict[str, Any] = {"param_groups": groups} if groups else {}
    return found | _nested(tree, schedule=True)


def _regroup(
    flat: Mapping[str, Mapping[str, object]], table: Mapping[object, str]
) -> list[dict[str, Any]]:
    """Parameters with equal settings form a group again."""
    groups: dict[str, dict[str, Any]] = {}
    for parameter, settings in flat.items():
        values = {k: _values(v) for k, v in settings.items() if k not in ("params", "param_names")}
        group = groups.setdefault(repr(sorted(values.items(), key=str)), {**values, "params": []})
        group["params"].append(table.get(parameter, parameter))
    return list(groups.values())


def _nested(tree: StateTree, *, schedule: bool) -> dict[str, Any]:
    chosen = {p: v for p, v in tree.rest.items() if _is_schedule(p) == schedule}
    found = _values(nest(chosen))
    assert isinstance(found, dict)
    return found


def _is_schedule(path: KeyPath) -> bool:
    return any(word in str(part).lower() for part in path for word in _SCHEDULES)
