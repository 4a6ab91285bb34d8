"""Which ranks a tag folder should have, and the opened files of those it has.

World sizes come from inside the files (``partition_count``, ``dp_world_size``), never from counting
files: a folder that was saved into twice holds stale ranks of the older, larger world.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...errors import FormatError
from .folder import Folder, missing
from .states import ModelState, OptimState, read_model, read_optim, same_step

T = TypeVar("T")
_THREADS = 8
_READ_ALL = 16  # model files of a stage 3 world that are read even if they only repeat rank 0
_RANK = re.compile(r"^(.*zero_pp_rank_)(\d+)(_mp_rank_)(\d+)(.*)$")


@dataclass(frozen=True, slots=True)
class Grid:
    """The opened rank files.

    Attributes:
        folder: where they are.
        models: per mp rank the model file (stage 3: those of all dp ranks).
        optims: per mp rank the optimizer files in dp order; empty lists when there are none.
        step: training step of the save.
        warnings: what was ignored, in plain words.
    """

    folder: Folder
    models: tuple[tuple[ModelState, ...], ...]
    optims: tuple[tuple[OptimState, ...], ...]
    step: int | None
    warnings: tuple[str, ...]

    @property
    def first(self) -> ModelState:
        """The model file of rank 0."""
        return self.models[0][0]

    @property
    def stage(self) -> int:
        """The ZeRO stage that the files show."""
        ranks = self.optims[0]
        return ranks[0].stage if ranks else 0

    @property
    def dp(self) -> int:
        """Data-parallel ranks that share the optimizer (or hold copies, without ZeRO)."""
        if self.optims[0]:
            return len(self.optims[0])
        return self.first.fields.integer("dp_world_size") or 1

    @property
    def ep(self) -> int:
        """Expert-parallel ranks: groups of experts are cut over fewer ranks than the others."""
        ranks = self.optims[0]
        if not self.folder.experts or not ranks:
            return 1
        return max(1, len(ranks) // min(ranks[0].counts))


def read_all(paths: Iterable[Path], read: Callable[[Path], T]) -> list[T]:
    """Open many rank files; several at a time, for file systems with high latency."""
    todo = list(paths)
    if len(todo) < 4:
        return [read(p) for p in todo]
    with ThreadPoolExecutor(min(_THREADS, len(todo))) as pool:
        return list(pool.map(read, todo))


def read_grid(folder: Folder) -> Grid:
    """Open every rank file of a tag folder.

    Raises:
        FormatError: missing ranks (by name), mixed world sizes, steps or ranks.
    """
    warnings: list[str] = []
    if folder.shards:
        models = _sharded_models(folder, warnings)
        optims = _optims(folder, len(models), models[0][0], warnings)
        for mp, ranks in enumerate(models):
            _need_shards(folder, mp, len(ranks), len(optims[mp]))
    else:
        single = _models(folder, warnings)
        models = tuple((m,) for m in single)
        optims = _optims(folder, len(models), single[0], warnings)
    step = same_step([m for ranks in models for m in ranks])
    _same_optimizer_step([o for ranks in optims for o in ranks], models[0][0], step, warnings)
    return Grid(folder, models, optims, step, tuple(warnings))


def _models(folder: Folder, warnings: list[str]) -> tuple[ModelState, ...]:
    if not folder.models:
        raise FormatError(
            f"{folder.path}: no mp_rank_XX_model_states.pt: the file with the weights and shapes "
            "is missing; copy it from the node of rank 0"
        )
    first = read_model(folder.models[min(folder.models)])
    world = first.fields.integer("mp_world_size") or len(folder.models)
    names = [f"mp_rank_{m:02d}_model_states.pt" for m in range(world)]
    why = f"{first.path.name} says mp_world_size {world}"
    missing(folder, names, [p.name for p in folder.models.values()], why)
    _ignore(folder, [p for m, p in folder.models.items() if m >= world], why, warnings)
    paths = [folder.models[m] for m in range(world)]
    states = read_all(paths, lambda p: first if p == first.path else read_model(p))
    for s in states:
        if s.fields.integer("dp_world_size") != first.fields.integer("dp_world_size"):
            raise FormatError(
                f"{s.path}: dp_world_size differs from that of {first.path.name}: files of saves "
                "with different world sizes are mixed"
            )
    return tuple(states)


def _sharded_models(folder: Folder, warnings: list[str]) -> tuple[tuple[ModelState, ...], ...]:
    """Model files of stage 3, per mp rank in dp order; ranks that no optimizer has are ignored."""
    world = 1 + max(mp for _, mp in folder.shards)
    found = []
    for mp in range(world):
        ranks = sorted(dp for dp, m in folder.shards if m == mp)
        count = _partitions(folder, mp)
        if count is not None:
            stale = [folder.shards[dp, mp] for dp in ranks if dp >= count]
            _ignore(folder, stale, f"the optimizer is cut over {count} ranks", warnings)
            ranks = [dp for dp in ranks if dp < count]
        names = [f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_model_states.pt" for dp in range(count or 1)]
        present = [folder.shards[dp, mp].name for dp in ranks]
        missing(folder, names, present, f"the optimizer is cut over {count} ranks")
        found.append(_needed([folder.shards[dp, mp] for dp in ranks]))
    return tuple(found)


def _needed(paths: list[Path]) -> tuple[ModelState, ...]:
    """Open the model files of a stage 3 rank: all of them in a small world, or when parameters are
    frozen. Otherwise only the first one says anything that the optimizer files do not.
    """
    first = read_model(paths[0])
    if len(paths) > _READ_ALL and not first.frozen:
        return first, *read_all(paths[-1:], read_model)
    return first, *read_all(paths[1:], read_model)


def _partitions(folder: Folder, mp: int) -> int | None:
    ranks = sorted(dp for dp, m in folder.optim if m == mp)
    return max(read_optim(folder.optim[ranks[0], mp]).counts) if ranks else None


def _need_shards(folder: Folder, mp: int, models: int, optims: int) -> None:
    if optims == 0:
        raise FormatError(
            f"{folder.path}: no *zero_pp_rank_*_mp_rank_{mp:02d}_optim_states.pt: under ZeRO-3 the "
            "weights lie in the optimizer files, and they are missing; copy them from the nodes "
            f"that wrote them ({models} model files are here)"
        )


def _optims(
    folder: Folder, world: int, model: ModelState, warnings: list[str]
) -> tuple[tuple[OptimState, ...], ...]:
    if not folder.optim:
        return ((),) * world
    stale = [p for (_, mp), p in folder.optim.items() if mp >= world]
    _ignore(folder, stale, f"the model is cut over {world} mp ranks", warnings)
    found: list[tuple[OptimState, ...]] = []
    for mp in range(world):
        table = {dp: p for (dp, m), p in folder.optim.items() if m == mp}
        found.append(_dp_ranks(folder, mp, table, model, warnings))
    return tuple(found)


def _dp_ranks(
    folder: Folder, mp: int, table: dict[int, Path], model: ModelState, warnings: list[str]
) -> tuple[OptimState, ...]:
    pattern = next(iter(table.values()), next(iter(folder.optim.values()))).name
    if not table:
        missing(folder, [_named(pattern, 0, mp)], [], "other mp ranks have optimizer files")
    first = read_optim(table[min(table)])
    count = max(first.counts)
    _check_world(first, count, model)
    names = [_named(pattern, dp, mp) for dp in range(count)]
    why = f"{first.path.name} says that there are {count} partitions"
    missing(folder, names, [_named(pattern, dp, mp) for dp in table], why)
    _ignore(folder, [p for dp, p in table.items() if dp >= count], why, warnings)
    paths = [table[dp] for dp in range(count)]
    states = read_all(paths, lambda p: first if p == first.path else read_optim(p))
    for s in states:
        for what, a, b in (
            ("partition counts", s.counts, first.counts),
            ("a ZeRO stage", s.stage, first.stage),
            ("a number of groups", len(s.masters), len(first.masters)),
        ):
            if a != b:
                raise FormatError(
                    f"{s.path}: has {what} of {a}, {first.path.name} of {b}: files of different "
                    "saves are mixed"
                )
    return tuple(states)


def _check_world(first: OptimState, count: int, model: ModelState) -> None:
    world = model.fields.integer("dp_world_size")
    if world is None or world == count:
        return
    zero = model.config.get("zero_optimization")
    mics = first.stage == 3 and isinstance(zero, dict) and zero.get("mics_shard_size")
    if not (mics and world % count == 0):
        raise FormatError(
            f"{first.path}: cut over {count} ranks, but {model.path.name} says dp_world_size "
            f"{world}: files of saves with different world sizes are mixed"
        )


def _named(pattern: str, dp: int, mp: int) -> str:
    match = _RANK.match(pattern)
    assert match is not None, f"{pattern} is no optimizer file"
    return f"{match[1]}{dp}{match[3]}{mp:02d}{match[5]}"


def _ignore(folder: Folder, paths: list[Path], why: str, warnings: list[str]) -> None:
    if paths:
        names = ", ".join(sorted(p.name for p in paths)[:4])
        warnings.append(
            f"{len(paths)} stale files of an older save are ignored ({names}...): {why}"
        )


def _same_optimizer_step(
    states: list[OptimState], model: ModelState, step: int | None, warnings: list[str]
) -> None:
    """Steps must agree over ranks; a step that is not the model's is suspicious only.

    Raises:
        FormatError: ranks of different saves.
    """
    if not states:
        return
    # expert groups and pipeline stages may have groups of their own: compare within an mp rank
    by_mp: dict[int, OptimState] = {}
    for s in states:
        first = by_mp.setdefault(s.mp, s)
        for k, (a, b) in enumerate(zip(s.steps, first.steps, strict=True)):
            if a is not None and b is not None and a != b:
                raise FormatError(
                    f"{s.path}: its optimizer is at step {a}, that of {first.path.name} at step "
                    f"{b} (group {k}): files of different saves are mixed"
                )
    taken = max((n for s in by_mp.values() for n in s.steps if n is not None), default=None)
    skipped = model.fields.integer("skipped_steps") or 0
    if taken is not None and step is not None and taken != step - skipped:
        warnings.append(
            f"the optimizer is at step {taken}, the model at {step} ({skipped} skipped): the "
            "optimizer was reset, or files of two saves are mixed; compare with --verify"
        )
