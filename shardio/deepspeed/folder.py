"""The files of one DeepSpeed tag folder (``global_step1000/``), told apart by their names.

``zero_pp_rank_{dp}_mp_rank_{mp}_optim_states.pt`` and its relatives: "pp_rank" is the ZeRO
data-parallel rank, "mp_rank" is pipeline stage * tp + tensor-parallel rank. torch names the only
folder of a zip file after the file, so a file remembers under which name it was saved: that is how
swapped rank files are found. Names follow ``runtime/engine.py`` and ``runtime/pipe/module.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ..source import open_file
from ..torchfile import TorchFile, open_torch_file

Rank = tuple[int, int]  # (dp, mp)

_KINDS = (
    ("optim", r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states"),
    ("shard", r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states"),
    ("model", r"mp_rank_(\d+)_model_states"),
    ("layer", r"layer_(\d+)(?:-model_(\d+))?-model_states"),
    ("expert", r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d+)_model_states"),
    ("expert_optim", r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states"),
)
_PATTERNS = tuple((kind, re.compile(rf"^{pattern}\.pt$")) for kind, pattern in _KINDS)
_UNFINISHED = (".tmp", ".temp", ".part", ".partial", ".incomplete", ".swp~")
_NAMES_SHOWN = 8
_MAX_TAG = 255


@dataclass(frozen=True, slots=True)
class Member:
    """What a file name says: its kind and its numbers (-1 where a part is absent)."""

    kind: str
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Folder:
    """The rank files of a tag folder.

    Attributes:
        path: the folder.
        optim: ZeRO optimizer files by (dp, mp).
        shards: model files of ZeRO stage 3 by (dp, mp).
        models: model files of the lower stages by mp.
        layers: pipeline layer files by (layer, tp).
        experts: expert files by (MoE layer or -1, global expert, mp).
        expert_optim: optimizer files of MoE without ZeRO by (ep, mp).
        unfinished: names that only an interrupted save or copy leaves.
    """

    path: Path
    optim: dict[Rank, Path] = field(default_factory=dict)
    shards: dict[Rank, Path] = field(default_factory=dict)
    models: dict[int, Path] = field(default_factory=dict)
    layers: dict[Rank, Path] = field(default_factory=dict)
    experts: dict[tuple[int, int, int], Path] = field(default_factory=dict)
    expert_optim: dict[Rank, Path] = field(default_factory=dict)
    unfinished: tuple[str, ...] = ()


def member(name: str) -> Member | None:
    """Return what a file name means, or None for foreign names."""
    for kind, pattern in _PATTERNS:
        if match := pattern.match(name):
            return Member(kind, tuple(-1 if n is None else int(n) for n in match.groups()))
    return None


def is_tag_folder(path: Path) -> bool:
    """Whether a folder holds DeepSpeed rank files. Never raises."""
    try:
        with os.scandir(path) as entries:
            return any(member(e.name) is not None and e.is_file() for e in entries)
    except OSError:
        return False


def latest(save_folder: Path, file_name: str = "latest") -> str | None:
    """Return the tag that a save folder's ``latest`` file names, or None. Never raises."""
    try:
        with open_file(save_folder / file_name) as file:
            tag = file.read(_MAX_TAG + 1).decode("utf-8", "replace").strip()
    except OSError:
        return None
    fine = tag and len(tag) <= _MAX_TAG and not set(tag) & set("/\\\0\n") and tag not in (".", "..")
    return tag if fine else None


def scan(path: Path) -> Folder:
    """List a tag folder.

    Raises:
        FormatError: two files claim the same rank.
    """
    found = Folder(path)
    unfinished = []
    for file in sorted(path.iterdir()):
        if file.name.endswith(_UNFINISHED):
            unfinished.append(file.name)
        what = member(file.name)
        if what is not None and file.is_file():
            _place(found, what, file)
    return Folder(
        path, found.optim, found.shards, found.models, found.layers, found.experts,
        found.expert_optim, tuple(unfinished),
    )  # fmt: skip


def _place(found: Folder, what: Member, file: Path) -> None:
    tables: dict[str, dict[Any, Path]] = {
        "optim": found.optim, "shard": found.shards, "model": found.models, "layer": found.layers,
        "expert": found.experts, "expert_optim": found.expert_optim,
    }  # fmt: skip
    table = tables[what.kind]
    numbers = tuple(max(n, 0) for n in what.numbers) if what.kind == "layer" else what.numbers
    key = numbers[0] if what.kind == "model" else numbers
    if key in table:
        raise FormatError(
            f"{found.path}: {table[key].name} and {file.name} are both the same rank; "
            "the folder holds two saves, remove the older one"
        )
    table[key] = file


def load(path: Path) -> TorchFile:
    """Open a rank file and check that it was saved under the name it has.

    Raises:
        FormatError: unreadable, or a file of another rank under this name.
    """
    file = open_torch_file(path)
    now, then = member(path.name), member(file.archive + ".pt")
    if now is not None and then is not None and now != then:
        raise FormatError(
            f"{path}: this file was saved as {file.archive}.pt; rank files were swapped or "
            "renamed, give them their names back"
        )
    return file


def missing(folder: Folder, expected: Iterable[str], present: Sequence[str], why: str) -> None:
    """Raise FormatError naming every expected file that is not there.

    Args:
        folder: where.
        expected: acceptable file names.
        present: names that are there.
        why: what says that they must exist.
    """
    gone = sorted(set(expected) - set(present))
    if gone:
        shown = ", ".join(gone[:_NAMES_SHOWN])
        more = f" and {len(gone) - _NAMES_SHOWN} more" if len(gone) > _NAMES_SHOWN else ""
        half = f"; unfinished files lie there: {', '.join(folder.unfinished[:3])}"
        raise FormatError(
            f"{folder.path}: {len(gone)} rank file{'s' * (len(gone) > 1)} missing: {shown}{more} "
            f"({why}); copy them from the node that wrote them"
            f"{half if folder.unfinished else ''}"
        )
