"""FairScale FSDP as metaseq (OPT) and fairseq save it: flat parameters, one file per shard.

``<stem>[-model_part-M]-shardR.pt`` holds ``model`` (flat 1-D vectors) and ``shard_metadata`` with
the names, shapes and sizes inside each vector and this rank's padding, so nothing else is needed.
Model parts (tensor parallel) are joined by metaseq's names. Source: fairscale 0.4
``nn/data_parallel/fully_sharded_data_parallel.py``, metaseq ``checkpoint_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...errors import FormatError, LayoutError, UnsupportedError
from ..checkpoint import Checkpoint
from ..coverage import prove
from ..fairscale_shard import ModelPart, ShardFile, read_shard
from ..layout import Layout
from ..placement import Fused, Placement, Shard
from ..registry import Format, OpenOptions
from ..state_checkpoint import model_files
from ..tensor import LazyTensor

_FILE = re.compile(r"^(?P<stem>.+?)(?:-model_part-(?P<mp>\d+))?-shard(?P<shard>\d+)\.pt$")
_THREADS = 8
_ROWS = ("embed_tokens.weight", "output_projection.weight", "fc1.weight", "fc1.bias")
_COLUMNS = ("out_proj.weight", "fc2.weight")
_WHOLE = ("out_proj.bias", "fc2.bias", "layer_norm.weight", "layer_norm.bias", "version",
          "embed_positions.weight", "_float_tensor")  # fmt: skip

Ranks = Mapping[tuple[int, int], Path]


def detect(path: Path) -> Path | None:
    """Return the folder, or the file where a folder holds several saves."""
    if path.is_file():
        return path if _FILE.match(path.name) else None
    return path if _saves(path) else None


def _saves(folder: Path) -> dict[str, dict[tuple[int, int], Path]]:
    """Return {stem: {(model part, shard): file}}."""
    found: dict[str, dict[tuple[int, int], Path]] = {}
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError:
        return {}
    for name in names:
        if m := _FILE.match(name):
            group = found.setdefault(m["stem"], {})
            group[int(m["mp"] or 0), int(m["shard"])] = folder / name
    return found


def open_fairscale(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a folder of shards (``checkpoint_last`` where there are several saves) or one save.

    Raises:
        FormatError: missing, damaged or swapped files; no ``shard_metadata``.
        LayoutError: sizes that contradict the metadata.
        UnsupportedError: model parts of a model whose cuts are not known.
    """
    stem, ranks = _choose(root)
    world = _demand_all(root, stem, ranks)
    with ThreadPoolExecutor(_THREADS) as pool:
        files = dict(zip(ranks, pool.map(read_shard, ranks.values()), strict=True))
    parts = [ModelPart.of([files[mp, r] for r in range(world[1])], root) for mp in range(world[0])]
    weights, placements, replicas = _join(root, parts, lambda p: p.weights)
    prove(weights, root)
    optimizer: dict[str, dict[str, LazyTensor]] = {}
    for state in parts[0].optimizer:
        optimizer[state] = _join(root, parts, lambda p, s=state: p.optimizer[s])[0]
        prove(optimizer[state], f"{root}: optimizer state {state}")
    config, assets = model_files(root, options)
    first: ShardFile = files[0, 0]
    return Checkpoint(
        path=root,
        format="fairscale",
        weights=weights,
        optimizer=optimizer,
        step=first.step,
        config=config,
        args=first.settings,
        scalars={"param_groups": first.groups} if first.groups else {},
        layout=Layout(format="fairscale", tp=world[0], dp=world[1], zero_stage=3),
        placements=placements,
        replicas=replicas,
        tied=parts[0].tied,
        assets=assets,
        warnings=parts[0].notes,
    )


def _choose(root: Path) -> tuple[str, dict[tuple[int, int], Path]]:
    saves = _saves(root.parent if root.is_file() else root)
    if root.is_file():
        match = _FILE.match(root.name)
        assert match is not None, "detect returns matching files only"
        return match["stem"], saves[match["stem"]]
    if len(saves) == 1 or "checkpoint_last" in saves:
        stem = next(iter(saves)) if len(saves) == 1 else "checkpoint_last"
        return stem, saves[stem]
    raise FormatError(
        f"{root}: several saves are here ({', '.join(sorted(saves)[:6])}); name one of the files "
        "of the one that is meant"
    )


def _demand_all(root: Path, stem: str, ranks: Ranks) -> tuple[int, int]:
    """Return (model parts, shards) after demanding every file between."""
    parts, shards = (max(r[k] for r in ranks) + 1 for k in range(2))
    missing = [(m, s) for m in range(parts) for s in range(shards) if (m, s) not in ranks]
    if missing:
        m, s = missing[0]
        name = f"{stem}-model_part-{m}-shard{s}.pt" if parts > 1 else f"{stem}-shard{s}.pt"
        raise FormatError(
            f"{root}: {len(missing)} of {parts * shards} shard files are missing, first {name}"
        )
    return parts, shards


def _join(
    root: Path, parts: Sequence[ModelPart], pick: Any
) -> tuple[
    dict[str, LazyTensor],
    dict[str, Mapping[str, Placement]],
    dict[str, tuple[LazyTensor, ...]],
]:
    """Join tensor-parallel model parts by metaseq's names."""
    tables: list[Mapping[str, LazyTensor]] = [pick(p) for p in parts]
    if len(parts) == 1:
        return dict(tables[0]), {}, {}
    weights: dict[str, LazyTensor] = {}
    placements: dict[str, Mapping[str, Placement]] = {}
    replicas: dict[str, tuple[LazyTensor, ...]] = {}
    for name, first in tables[0].items():
        pieces = [t[name] for t in tables if name in t]
        if len(pieces) < len(tables):
            raise FormatError(f"{root}: {name} is not in every model part")
        placement = _placement(root, name, first, len(parts))
        if placement is None:
            weights[name], replicas[name] = first, tuple(pieces[1:])
            continue
        try:
            weights[name] = placement.assemble(pieces)
        except ValueError as e:
            raise LayoutError(f"{root}: {name}: the model parts do not fit: {e}") from e
        placements[name] = {"tp": placement}
    return weights, placements, replicas


def _placement(root: Path, name: str, piece: LazyTensor, parts: int) -> Placement | None:
    """How metaseq cuts a tensor over model parts; None where it is repeated."""
    if name.endswith(_WHOLE):
        return None
    if name.endswith(_ROWS):
        return Shard(0, even=True)
    if name.endswith(_COLUMNS):
        return Shard(1, even=True)
    if name.endswith(("qkv_proj.weight", "qkv_proj.bias")):
        return Fused(0, (piece.shape[0] * parts // 3,) * 3)
    if name.endswith(tuple(f"{x}_proj.{k}" for x in "qkv" for k in ("weight", "bias"))):
        return Shard(0, even=True)
    raise UnsupportedError(
        f"{root}: how {name} {list(piece.shape)} is cut over {parts} model parts is not known"
    )


FORMAT = Format("fairscale", "FairScale FSDP (metaseq)", detect, open_fairscale, rank=45)
