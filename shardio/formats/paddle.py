"""PaddlePaddle and PaddleNLP: ``.pdparams`` of one or many ranks, unified safetensors.

Rank files are ``model_state.tp00_pp01.pdparams``, with ``optimizer.tp00_pp01_shard00.pdopt``
beside them; the pieces of a tensor say nothing of how it was cut, so PaddleNLP's rules decide by
the name and the config's numbers. A unified checkpoint is safetensors with
``optimizer*.safetensors`` and ``master_weights*.safetensors`` beside. Linear weights are
[in, out] (see ``convert/naming/paddlenlp``). Source: PaddleNLP ``trainer/training_args.py``,
``trainer/unified_checkpoint``, ``transformers/conversion_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import FormatError, UnsupportedError
from ..assets import load_json
from ..checkpoint import Checkpoint
from ..coverage import prove
from ..layout import Layout
from ..paddle_files import PaddleFile, optimizer_states, read_paddle, true_dtype
from ..placement import Fused, Placement, Shard
from ..registry import Format, OpenOptions
from ..source import read_small
from ..state_checkpoint import model_files
from ..tensor import LazyTensor
from . import hf

_RANK = re.compile(
    r"^(?P<stem>.+?)(?:\.(?P<axes>(?:(?:tp|pp|shard|moe)\d+_?)+))?\.(?P<kind>pdparams|pdopt)$"
)
_AXIS = re.compile(r"(tp|pp|shard|moe)(\d+)")
_COLUMN = re.compile(r"\.(?:[qkv]_proj|qkv_proj|gate_proj|up_proj|w1|w3)\.(?:weight|bias)$")
_GATE_UP = re.compile(r"\.gate_up_fused_proj\.(?:weight|bias)$")
_ROW = re.compile(r"\.(?:o_proj|down_proj|w2)\.weight$")
_KEY_VALUE = re.compile(r"\.[kv]_proj\.(?:weight|bias)$")
_STATE = re.compile(r"_(?:moment[12]|beta[12]_pow_acc|velocity)_\d+$")  # of an optimizer
_EMBEDDING, _HEAD = re.compile(r"(?:^|\.)embed_tokens\.weight$"), "lm_head.weight"

Rank = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class _Save:
    """The files of one stem and kind, by their places on the axes."""

    stem: str
    files: Mapping[Rank, Path]

    def size(self, axis: str) -> int:
        """Return how many ranks an axis has."""
        return 1 + max((dict(r).get(axis, 0) for r in self.files), default=0)


def detect(path: Path) -> Path | None:
    """Return the folder, or the file where it is the only rank."""
    if path.is_file():
        hit = _RANK.match(path.name)
        if hit is None or hit["kind"] != "pdparams":
            return None
        return path.parent if hit["axes"] else path
    try:
        saves = _saves(path, "pdparams")
    except OSError:
        return None
    return path if saves or _is_unified(path) else None


def _is_unified(folder: Path) -> bool:
    config = folder / "config.json"
    try:
        return b'"paddlenlp_version"' in read_small(config) and hf.detect(folder) is not None
    except OSError:
        return False


def _saves(folder: Path, kind: str) -> list[_Save]:
    found: dict[str, dict[Rank, Path]] = {}
    for file in sorted(folder.glob(f"*.{kind}")):
        hit = _RANK.match(file.name)
        if hit is not None and hit["kind"] == kind:
            axes = tuple((a, int(i)) for a, i in _AXIS.findall(hit["axes"] or ""))
            found.setdefault(hit["stem"], {})[axes] = file
    models = [_Save(stem, files) for stem, files in found.items()]
    named = [s for s in models if s.stem in ("model_state", "optimizer", "model")]
    return named or models


def open_paddle(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a file or a folder.

    Raises:
        FormatError: missing ranks, damaged files, pieces that do not fit together.
        UnsupportedError: a tensor that the rules do not know, expert-parallel rank files.
    """
    if root.is_dir() and not _saves(root, "pdparams"):
        return _open_unified(root, options)
    save, optimizer = _files_of(root)
    config, assets = model_files(root, options)
    cuts = _Cuts(root, save.size("tp"), config or {})
    files = {r: read_paddle(p) for r, p in save.files.items()}
    joined = _join(cuts, {r: _weights(f) for r, f in files.items()})
    prove(joined.weights, root)
    owners = {own: n for f in files.values() for n, own in f.parameters.items()}
    states = {r: read_paddle(p) for r, p in optimizer.files.items()} if optimizer else files
    tied = {}
    if cuts.tied and _HEAD in joined.weights:
        owner = next((n for n in joined.weights if _EMBEDDING.search(n)), _HEAD)
        if owner != _HEAD and joined.weights[owner].shape == joined.weights[_HEAD].shape:
            tied[_HEAD] = owner
            joined.replicas[owner] = (*joined.replicas.get(owner, ()), joined.weights.pop(_HEAD))
    found, notes = _optimizer(cuts, states, owners, joined.weights)
    return Checkpoint(
        path=root,
        format="paddle",
        weights=joined.weights,
        optimizer=found,
        step=hf.trainer_step(root if root.is_dir() else root.parent),
        config=config,
        layout=Layout(format="paddle", tp=cuts.tp, pp=save.size("pp")),
        placements=joined.placements,
        replicas=joined.replicas,
        tied=tied,
        assets=assets,
        warnings=tuple(notes),
    )


def _files_of(root: Path) -> tuple[_Save, _Save | None]:
    """Return the model's files and the optimizer's."""
    folder = root if root.is_dir() else root.parent
    models = _saves(folder, "pdparams")
    if root.is_file():
        models = [_Save(root.stem, {(): root})]
    if len(models) > 1:
        stems = ", ".join(f"{s.stem}.pdparams" for s in models)
        raise FormatError(f"{root}: holds several models ({stems}); name the file")
    save = models[0]
    _demand_all(root, save)
    stems = {"model_state": "optimizer"}.get(save.stem, save.stem)
    beside = [s for s in _saves(folder, "pdopt") if s.stem == stems]
    return save, beside[0] if beside else None


def _demand_all(root: Path, save: _Save) -> None:
    """Refuse a save of which ranks are missing."""
    if any("moe" in dict(r) for r in save.files):
        raise UnsupportedError(
            f"{root}: has expert-parallel rank files; save a unified checkpoint "
            "(unified_checkpoint=1) and convert that"
        )
    axes = sorted({a for r in save.files for a, _ in r})
    wanted: list[Rank] = [()]
    for axis in ("tp", "pp", "shard"):
        if axis in axes:
            wanted = [(*w, (axis, i)) for w in wanted for i in range(save.size(axis))]
    missing = [w for w in wanted if w not in save.files]
    if missing:
        names = ["_".join(f"{a}{i:02d}" for a, i in w) for w in missing]
        raise FormatError(
            f"{root}: {len(missing)} of {len(wanted)} rank files of {save.stem} are missing: "
            f"{', '.join(names[:8])}"
        )


def _weights(file: PaddleFile) -> dict[str, LazyTensor]:
    """Return the model's tensors: those of the dict that has most, and is no optimizer's."""
    groups: dict[tuple[str, ...], int] = {}
    for keys in file.tensors:
        if not any("optim" in k.lower() for k in keys[:-1]) and not _STATE.search(keys[-1]):
            groups[keys[:-1]] = groups.get(keys[:-1], 0) + 1
    return file.below(*max(groups, key=lambda g: groups[g])) if groups else {}


# -- tensor parallelism ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cuts:
    """How PaddleNLP cuts the tensors of a model over ``tp`` ranks."""

    root: Path
    tp: int
    config: Mapping[str, Any]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.config.get("tie_word_embeddings") is True

    def placement(self, name: str, pieces: Sequence[LazyTensor]) -> Placement | None:
        """Return how a tensor is cut, None where every rank has it whole.

        Raises:
            FormatError: missing pieces, pieces of several shapes, a number that the config lacks.
            UnsupportedError: no rule for the name.
        """
        if self.tp == 1:
            return None
        self._check(name, pieces)
        last = pieces[0].ndim - 1
        if _KEY_VALUE.search(name) and self._number("num_key_value_heads") % self.tp:
            return None
        if _EMBEDDING.search(name) or name == _HEAD:
            rows = name != _HEAD or self.tied
            whole = self._number("vocab_size") % self.tp
            return None if whole else Shard(0 if rows else last, even=True)
        if _GATE_UP.search(name):
            half = pieces[0].shape[last] * self.tp // 2
            return Fused(last, (half, half))
        if _COLUMN.search(name):
            return Shard(last, even=True)
        if _ROW.search(name):
            return Shard(0, even=True)
        if last < 1 or name.endswith(".gate.weight"):
            return None
        raise UnsupportedError(
            f"{self.root}: how {name} {list(pieces[0].shape)} is cut over {self.tp} tp ranks is "
            "not known"
        )

    def _check(self, name: str, pieces: Sequence[LazyTensor]) -> None:
        if len(pieces) != self.tp:
            raise FormatError(f"{self.root}: {name} is on {len(pieces)} of {self.tp} tp ranks")
        if len({p.shape for p in pieces}) > 1:
            shapes = ", ".join(str(list(p.shape)) for p in pieces)
            raise FormatError(f"{self.root}: the pieces of {name} differ in shape: {shapes}")

    def _number(self, key: str) -> int:
        heads = self.config.get("num_attention_heads") if "heads" in key else None
        value = self.config.get(key, heads)
        if type(value) is not int:
            raise FormatError(
                f"{self.root}: config.json with {key} is needed to join the {self.tp} tp ranks; "
                "give it with --config"
            )
        return value


@dataclass(slots=True)
class _Joined:
    """Whole tensors, how they were cut, and further copies of them."""

    weights: dict[str, LazyTensor]
    placements: dict[str, dict[str, Placement]]
    replicas: dict[str, tuple[LazyTensor, ...]]


def _join(cuts: _Cuts, parts: Mapping[Rank, Mapping[str, LazyTensor]]) -> _Joined:
    """Join tensor-parallel pieces; equal names on other stages and shards are copies."""
    by_name: dict[str, dict[tuple[int, int], dict[int, LazyTensor]]] = {}
    for rank, tensors in parts.items():
        at = dict(rank)
        where = (at.get("pp", 0), at.get("shard", 0))
        for name, tensor in tensors.items():
            by_name.setdefault(name, {}).setdefault(where, {})[at.get("tp", 0)] = tensor
    if not by_name:
        raise FormatError(f"{cuts.root}: holds no tensors that could be model weights")
    joined = _Joined({}, {}, {})
    for name, places in by_name.items():
        copies: list[LazyTensor] = []
        for by_rank in places.values():
            pieces = [by_rank[r] for r in sorted(by_rank)]
            placement = cuts.placement(name, pieces)
            if placement is None:
                copies += pieces
            else:
                copies.append(placement.assemble(pieces))
                joined.placements[name] = {"tp": placement}
        joined.weights[name] = copies[0]
        if copies[1:]:
            joined.replicas[name] = tuple(copies[1:])
    return joined


def _optimizer(
    cuts: _Cuts,
    files: Mapping[Rank, PaddleFile],
    owners: Mapping[str, str],
    weights: Mapping[str, LazyTensor],
) -> tuple[dict[str, dict[str, LazyTensor]], list[str]]:
    """Return the states by kind and weight, and what to tell."""

    def owner_of(name: str) -> str | None:
        owner = owners.get(name, name)
        return owner if owner in weights else None

    pieces: dict[str, dict[Rank, dict[str, LazyTensor]]] = {}
    for rank, file in files.items():
        for kind, owner, tensor in optimizer_states(file.tensors, owner_of):
            pieces.setdefault(kind, {}).setdefault(rank, {})[owner] = tensor
    found: dict[str, dict[str, LazyTensor]] = {}
    notes = []
    for kind, parts in pieces.items():
        joined = _join(cuts, parts).weights
        fit = {n: t for n, t in joined.items() if t.shape == weights[n].shape}
        if len(fit) < len(joined):
            notes.append(
                f"optimizer state {kind}: {len(joined) - len(fit)} tensors have other shapes than "
                "their weights (flattened by sharding) and are left out"
            )
        if fit:
            prove(fit, f"{cuts.root}: optimizer state {kind}")
            found[kind] = fit
    return found, notes


# -- unified checkpoints ---------------------------------------------------------------------------


def _open_unified(root: Path, options: OpenOptions) -> Checkpoint:
    """Safetensors as Hugging Face has them, states keyed ``weight/moment1_0``, bfloat16 as uint16
    where numpy wrote it.
    """
    ckpt = hf.open_hf(root, options)

    def owner_of(name: str) -> str | None:
        return name if name in ckpt.weights else None

    notes = [w for w in ckpt.warnings if "optimizer state" not in w]
    states: dict[str, dict[str, LazyTensor]] = {}
    leaves: dict[tuple[str, ...], LazyTensor] = {
        (n,): t for n, t in hf.read_set(root, "optimizer", notes).items()
    }
    for kind, owner, tensor in optimizer_states(leaves, owner_of):
        states.setdefault(kind, {})[owner] = tensor
    masters = hf.read_set(root, "master_weights", notes)
    states["master"] = {n: t for n, t in masters.items() if n in ckpt.weights}
    for state, tensors in states.items():
        prove(tensors, f"{root}: optimizer state {state}")
    version = load_json(root / "config.json").get("paddlenlp_version")
    return replace(
        ckpt,
        format="paddle",
        weights={n: true_dtype(t) for n, t in ckpt.weights.items()},
        version=version if isinstance(version, str) else None,
        optimizer={s: t for s, t in states.items() if t},
        layout=Layout(format="paddle"),
        warnings=tuple(notes),
    )


FORMAT = Format("paddle", "PaddlePaddle (.pdparams, unified)", detect, open_paddle, rank=40)
