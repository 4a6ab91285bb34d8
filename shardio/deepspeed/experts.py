"""Mixture of experts (DeepSpeed's own MoE layer): one file per expert, optimizer groups of their
own.

Expert files use global expert numbers. The optimizer's expert groups use local numbers 0..n-1 on
every rank and are cut over the ranks that hold the same experts: rank % ep, or consecutive ranks
with ``use_data_before_expert_parallelism``. After ``engine.py`` (_save_moe_checkpoint) and
``utils/groups.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import FormatError
from ..source import FileSource
from ..stored import lazy
from ..tensor import LazyTensor
from . import autoep
from .fields import Fields, Shape
from .folder import Folder, load, missing
from .grid import read_all
from .states import ModelState, OptimState

_EXPERT = re.compile(r"^(.*\.deepspeed_experts\.)(\d+)(\..*)$")


@dataclass(frozen=True, slots=True)
class Owners:
    """The ranks that share one copy of an optimizer group.

    Attributes:
        ranks: in partition order.
        names: parameter name in the group to its name in the whole model.
        ep_rank: which expert-parallel rank they are.
    """

    ranks: tuple[OptimState, ...]
    names: Mapping[str, str]
    ep_rank: int = 0


def read_experts(folder: Folder, mp: int, model: ModelState) -> dict[str, LazyTensor]:
    """Return the 16-bit weights of all experts of a model-parallel rank.

    Raises:
        FormatError: expert files that should exist are missing, or hold the same tensor twice.
    """
    _check_files(folder, mp, model)
    found: dict[str, LazyTensor] = {}
    paths = [p for (_, _, m), p in sorted(folder.experts.items()) if m == mp]
    for path, root in zip(paths, read_all(paths, lambda p: load(p).root), strict=True):
        source = FileSource.of(path)
        fields = Fields(path, root)
        for name, stored in fields.tensors(fields.data, "expert").items():
            if name in found:
                raise FormatError(f"{path}: {name!r} is also in another expert file")
            found[name] = lazy(stored, source)
    return found


def _check_files(folder: Folder, mp: int, model: ModelState) -> None:
    counts = model.fields.plain("num_experts")
    if not isinstance(counts, list) or any(type(n) is not int or n < 0 for n in counts):
        return
    present = [p.name for (_, _, m), p in folder.experts.items() if m == mp]
    if present and all(layer < 0 for layer, _, m in folder.experts if m == mp):
        names = [f"expert_{e}_mp_rank_{mp:02d}_model_states.pt" for e in range(max(counts))]
    else:
        names = [
            f"layer_{i}_expert_{e}_mp_rank_{mp:02d}_model_states.pt"
            for i, n in enumerate(counts)
            for e in range(n)
        ] * any(n > 1 for n in counts)
    missing(folder, names, present, f"{model.path.name} says num_experts {counts}")


def owners(
    index: int, table: Mapping[str, Shape], ranks: Sequence[OptimState], model: ModelState
) -> list[Owners]:
    """Return who holds group ``index``: all ranks together, or for experts each expert-parallel
    rank on its own.

    Raises:
        FormatError: partition counts that do not divide the ranks.
    """
    count = ranks[0].counts[index]
    if count == len(ranks):
        return [Owners(tuple(ranks), {n: n for n in table})]
    ep, rest = divmod(len(ranks), count)
    local = _local_counts(table)
    fused = autoep.local_experts(model)
    if rest or any(_EXPERT.match(n) is None and not autoep.is_fused(n, fused) for n in table):
        raise FormatError(
            f"{ranks[0].path}: group {index} is cut into {count} partitions, there are "
            f"{len(ranks)} ranks, and it is no group of experts"
        )
    data_first = model.config.get("use_data_before_expert_parallelism") is True
    found = []
    for e in range(ep):
        chosen = [r for r in ranks if (r.dp // count if data_first else r.dp % ep) == e]
        found.append(Owners(tuple(chosen), {n: _global(n, e, local) for n in table}, e))
    return found


def _local_counts(table: Mapping[str, Shape]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in table:
        if match := _EXPERT.match(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def _global(name: str, ep_rank: int, local: Mapping[str, int]) -> str:
    match = _EXPERT.match(name)
    if match is None:  # fused experts are taken apart later
        return name
    return f"{match[1]}{ep_rank * local[match[1]] + int(match[2])}{match[3]}"
