"""nanotron checkpoints: one safetensors file per tensor and rank, with its place in the metadata.

``model/<module path>/model_<param>_pp-rank-P-of-N_tp-rank-T-of-N.safetensors`` holds ``data`` and
says by slice pairs (local to global) where its rows and columns belong, so no layer has to be
known. Source: nanotron ``serialize/{weights,metadata,utils}.py``, versions 1.2 to 1.5; optimizer
states are in ``nanotron_optimizer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FormatError, UnsupportedError
from ..assets import load_json
from ..checkpoint import Checkpoint
from ..chunked import Chunked
from ..coverage import prove
from ..layout import Layout
from ..nanotron_cut import EMBEDDING, HEAD
from ..nanotron_optimizer import read_optimizer
from ..nanotron_place import Piece, assemble, parse_pairs, parse_shape, whole
from ..registry import Format, OpenOptions
from ..safetensors_header import read_header
from ..source import FileSource, read_small
from ..state_checkpoint import model_files

_META, _MODEL_CONFIG, _LATEST = "checkpoint_metadata.json", "model_config.json", "latest.txt"
_FILE = re.compile(
    r"^model_(?P<param>[^-]+?)(?:\.safetensors)?"
    r"(?:_pp-rank-(?P<pp>\d+)-of-(?P<pps>\d+)_tp-rank-(?P<tp>\d+)-of-(?P<tps>\d+))?"
    r"(?:_exp-rank-(?P<ep>\d+)-of-(?P<eps>\d+))?\.safetensors$"
)
_THREADS = 8


def detect(path: Path) -> Path | None:
    """Return the folder of one step; a run's root names its newest in ``latest.txt``."""
    if path.is_file():
        return (
            path.parent if path.name in (_META, _MODEL_CONFIG) and _is_step(path.parent) else None
        )
    if _is_step(path):
        return path
    try:
        name = read_small(path / _LATEST).decode("utf-8")[:64].strip()
    except (OSError, ValueError):
        return None
    return path / name if name.isdigit() and _is_step(path / name) else None


def _is_step(folder: Path) -> bool:
    return (folder / _MODEL_CONFIG).is_file() and (folder / "model").is_dir()


def open_nanotron(root: Path, options: OpenOptions) -> Checkpoint:
    """Open the folder of one step.

    Raises:
        FormatError: an unfinished save, missing rank files, holes, files of several layouts.
        UnsupportedError: experts spread over ranks.
    """
    if not (root / _META).is_file():
        raise FormatError(f"{root}: has no {_META}: the save did not finish")
    meta, settings = _object(root / _META), _object(root / _MODEL_CONFIG)
    pieces: dict[str, list[Piece]] = {}
    files = sorted((root / "model").rglob("*.safetensors"))
    if not files:
        raise FormatError(f"{root / 'model'}: holds no safetensors files")
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, piece in pool.map(lambda f: _read(root, f), files):
            pieces.setdefault(name, []).append(piece)
    tp = _check_ranks(root, pieces, meta)
    weights = {n: assemble(root, n, p) for n, p in pieces.items()}
    prove(weights, root)
    optimizer, step, scalars = read_optimizer(root, pieces)
    for state, tensors in optimizer.items():
        prove(tensors, f"{root}: optimizer state {state}")
    config, assets = model_files(root, options)
    metas = meta.get("metas")
    last = metas.get("last_train_step") if isinstance(metas, Mapping) else None
    return Checkpoint(
        path=root,
        format="nanotron",
        version=str(meta.get("version")),
        naming="nanotron",
        weights=weights,
        optimizer=optimizer,
        step=last if isinstance(last, int) else step,
        config=config,
        args=settings,
        scalars=scalars,
        layout=Layout(format="nanotron", tp=tp, pp=_stages(pieces), dp=_number(meta, "dp")),
        tied={HEAD: EMBEDDING} if _is_tied(settings, weights) else {},
        assets=assets,
    )


def _is_tied(settings: Mapping[str, Any], weights: Mapping[str, object]) -> bool:
    return settings.get("tie_word_embeddings") is True and HEAD not in weights


def _object(path: Path) -> dict[str, Any]:
    value = load_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return value


def _number(meta: Mapping[str, Any], key: str) -> int:
    value = meta.get(key)
    return value if type(value) is int and value > 0 else 1


def _read(root: Path, path: Path) -> tuple[str, Piece]:
    match = _FILE.match(path.name)
    if match is None:
        raise FormatError(f"{path}: not a file name of nanotron (model_<param>_pp-rank-...)")
    if match["eps"] and int(match["eps"]) > 1:
        raise UnsupportedError(
            f"{path}: experts spread over {match['eps']} ranks: their numbers in the whole model "
            "are not in the file"
        )
    header = read_header(path)
    if list(header.tensors) != ["data"]:
        raise FormatError(f"{path}: expected one tensor named 'data', found {list(header.tensors)}")
    entry = header.tensors["data"]
    tensor = Chunked.contiguous(
        FileSource(path, header.file_size), entry.start, entry.shape, entry.dtype
    )
    folders = path.parent.relative_to(root / "model").parts
    name = ".".join((*folders, match["param"]))
    if match["pps"] is None:
        return name, whole(path, tensor)
    shape = parse_shape(path, header.metadata.get("unsharded_shape", ""))
    pairs = parse_pairs(path, header.metadata.get("local_global_slices_pairs", ""), entry.shape)
    rank = {k: int(match[k]) for k in ("pp", "pps", "tp", "tps")}
    return name, Piece(path, tensor, shape, pairs, **rank)


def _check_ranks(root: Path, pieces: Mapping[str, Sequence[Piece]], meta: Mapping[str, Any]) -> int:
    """Return the tensor parallel size after demanding every rank's file of every tensor."""
    sizes = {p.tps for group in pieces.values() for p in group if p.sharded}
    expected = meta.get("tp")
    if isinstance(expected, int) and not sizes <= {expected}:
        raise FormatError(f"{root}: {_META} says tp={expected}, file names say {sorted(sizes)}")
    if len(sizes) > 1:
        raise FormatError(f"{root}: files of several tp sizes are mixed: {sorted(sizes)}")
    for name, group in pieces.items():
        if not group[0].sharded:
            if len(group) > 1:
                raise FormatError(f"{root}: {name} is there whole and in parts")
            continue
        ranks = {p.tp for p in group}
        missing = [t for t in range(group[0].tps) if t not in ranks]
        if missing:
            first = group[0].path.name
            raise FormatError(
                f"{root}: {name}: files of tp ranks {missing[:8]} are missing (there is {first})"
            )
        if len({(p.pp, p.pps, p.shape, p.sharded) for p in group}) > 1 or len(group) > len(ranks):
            raise FormatError(f"{root}: the files of {name} belong to different saves")
        starts = [p.pairs[0][1] for p in sorted(group, key=lambda p: p.tp)]
        if starts != sorted(starts):
            raise FormatError(f"{root}: {name}: rank files were swapped (their slices descend)")
    return max(sizes, default=1)


def _stages(pieces: Mapping[str, Sequence[Piece]]) -> int:
    return max((p.pps for group in pieces.values() for p in group), default=1)


FORMAT = Format("nanotron", "nanotron", detect, open_nanotron, rank=40)
