"""Optimizer states of nanotron: one ``torch.save`` file per rank, plain or ZeRO-1.

``optimizer/optimizer_pp-P-of-N[_dp-D-of-N]_tp-T-of-N_exp-E-of-N.pt`` has ``state`` by number and
``names`` of the numbers; states are shaped like the rank's part of the weight. With ZeRO-1 they are
flat ranges of it, which ``optimizer_config.json`` tells by DP rank. fp32 masters are
``gradient_accumulator``. Source: nanotron ``serialize/optimizer.py`` and ``optim/zero.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, LayoutError
from .assets import load_json
from .names import strip_wrappers
from .nanotron_place import Piece, assemble
from .records import StoredTensor
from .stored import lazy, plain
from .tensor import LazyTensor, concat
from .torchfile import open_torch_file

_FILE = re.compile(
    r"^optimizer_pp-(?P<pp>\d+)-of-(?P<pps>\d+)(?:_dp-(?P<dp>\d+)-of-(?P<dps>\d+))?"
    r"_tp-(?P<tp>\d+)-of-(?P<tps>\d+)(?:_exp-\d+-of-\d+)?\.pt$"
)
_MASTERS = "gradient_accumulator"
_THREADS = 4

Ranges = Mapping[str, Mapping[int, tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class _Rank:
    """One rank's file: {weight: {state: tensor}}, plain step and groups."""

    path: Path
    states: Mapping[str, Mapping[str, LazyTensor]]
    step: int | None
    groups: Any


def read_optimizer(
    root: Path, pieces: Mapping[str, Sequence[Piece]]
) -> tuple[dict[str, dict[str, LazyTensor]], int | None, dict[str, Any]]:
    """Return (states, step, scalars) of a checkpoint; all empty without an ``optimizer`` folder.

    Args:
        root: folder of the step.
        pieces: of the weights, by name.

    Raises:
        FormatError: missing or damaged rank files, states of unknown weights.
        LayoutError: ranges that do not fit the weights.
    """
    folder = root / "optimizer"
    files = _files(folder)
    if not files:
        return {}, None, {}
    with ThreadPoolExecutor(_THREADS) as pool:
        ranks = dict(zip(files, pool.map(_read, files.values()), strict=True))
    ranges = _ranges(folder)
    found: dict[str, dict[str, LazyTensor]] = {}
    names = {(n, s) for r in ranks.values() for n, states in r.states.items() for s in states}
    for name, state in sorted(names):
        if name not in pieces:
            raise FormatError(f"{folder}: has a state of {name}, but the model has no such weight")
        found.setdefault(state, {})[name] = _joined(
            folder, name, state, pieces[name], ranks, ranges
        )
    first = next(iter(ranks.values()))
    return found, first.step, {"param_groups": first.groups}


def _files(folder: Path) -> dict[tuple[int, int, int], Path]:
    """Return rank files by (pp, tp, dp); all must be there."""
    found: dict[tuple[int, int, int], Path] = {}
    sizes: set[tuple[int, int, int]] = set()
    for path in sorted(folder.glob("optimizer_pp-*.pt")):
        m = _FILE.match(path.name)
        if m is None:
            raise FormatError(f"{path}: not a file name of nanotron's optimizer")
        found[int(m["pp"]), int(m["tp"]), int(m["dp"] or 0)] = path
        sizes.add((int(m["pps"]), int(m["tps"]), int(m["dps"] or 1)))
    if len(sizes) > 1:
        raise FormatError(
            f"{folder}: optimizer files of several layouts are mixed: {sorted(sizes)}"
        )
    for pps, tps, dps in sizes:
        if len(found) != pps * tps * dps:
            raise FormatError(
                f"{folder}: {len(found)} optimizer files, expected pp x tp x dp = "
                f"{pps} x {tps} x {dps}"
            )
    return found


def _read(path: Path) -> _Rank:
    root = open_torch_file(path).root
    state = root.get("state") if isinstance(root, dict) else None
    names = root.get("names") if isinstance(root, dict) else None
    if not isinstance(state, dict) or not isinstance(names, dict):
        raise FormatError(f"{path}: expected a dict with 'state' and 'names'")
    assert isinstance(root, dict)
    found: dict[str, dict[str, LazyTensor]] = {}
    step: object = None
    for key, entries in state.items():
        if key not in names or not isinstance(entries, dict):
            raise FormatError(f"{path}: state {key!r} has no name")
        step = entries.get("step", step)
        tensors = {str(k): lazy(v) for k, v in entries.items() if _is_state(k, v)}
        found[strip_wrappers(str(names[key]))] = tensors
    masters = root.get(_MASTERS)
    for name, tensor in masters.items() if isinstance(masters, dict) else ():
        if isinstance(tensor, StoredTensor):
            found.setdefault(strip_wrappers(str(name)), {})["master"] = lazy(tensor)
    groups = [
        {k: v for k, v in g.items() if k != "params"} if isinstance(g, dict) else g
        for g in plain(root.get("param_groups")) or []
    ]
    value = plain(step)
    return _Rank(path, found, int(value) if isinstance(value, int | float) else None, groups)


def _is_state(key: object, value: object) -> bool:
    return isinstance(value, StoredTensor) and key != "step"


def _ranges(folder: Path) -> Ranges:
    """Return {weight: {dp rank: (first, end)}} of ZeRO-1; empty for a plain optimizer."""
    path = folder / "optimizer_config.json"
    config = load_json(path) if path.is_file() else {}
    inner = config.get("configs") if isinstance(config, dict) else None
    table = inner.get("param_name_to_dp_rank_offsets") if isinstance(inner, dict) else None
    if not table:
        return {}
    try:
        return {
            strip_wrappers(name): {int(d): (int(a), int(b)) for d, (a, b) in by_rank.items()}
            for name, by_rank in table.items()
        }
    except (AttributeError, TypeError, ValueError) as e:
        raise FormatError(f"{path}: param_name_to_dp_rank_offsets is malformed ({e})") from e


def _joined(
    folder: Path,
    name: str,
    state: str,
    pieces: Sequence[Piece],
    ranks: Mapping[tuple[int, int, int], _Rank],
    ranges: Ranges,
) -> LazyTensor:
    """Return one state of one weight: DP ranges per part, then the parts in their places."""
    parts = []
    for piece in pieces:
        stage = _stage(name, state, piece, ranks)
        held = {
            dp: rank.states[name][state]
            for (pp, tp, dp), rank in sorted(ranks.items())
            if pp == stage and tp == piece.tp and state in rank.states.get(name, {})
        }
        if not held:
            raise FormatError(f"{folder}: {state} of {name} is in no file of tp rank {piece.tp}")
        whole = held[min(held)].size == piece.tensor.size
        if name not in ranges or (state == "master" and whole):
            parts.append(held[min(held)].reshape(piece.tensor.shape))
            continue
        parts.append(_flat(folder, name, held, ranges[name]).reshape(piece.tensor.shape))
    return assemble(folder, name, pieces, parts)


def _stage(name: str, state: str, piece: Piece, ranks: Mapping[tuple[int, int, int], _Rank]) -> int:
    """The stage whose optimizer has it: the one of the file, except for unsharded tensors."""
    if piece.sharded:
        return piece.pp
    stages = (pp for (pp, _, _), r in sorted(ranks.items()) if state in r.states.get(name, {}))
    return next(stages, 0)


def _flat(
    folder: Path, name: str, held: Mapping[int, LazyTensor], ranges: Mapping[int, tuple[int, int]]
) -> LazyTensor:
    at, parts = 0, []
    for dp, (first, end) in sorted(ranges.items(), key=lambda kv: kv[1]):
        if first != at or dp not in held or held[dp].size != end - first:
            raise LayoutError(f"{folder}: {name}: DP rank {dp} should hold {first} to {end}")
        parts.append(held[dp].reshape((-1,)))
        at = end
    return concat(parts)
