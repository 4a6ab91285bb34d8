"""Megatron-LM's legacy ``torch`` checkpoints: one ``model_optim_rng.pt`` per model-parallel rank.

Source: ``megatron/training/checkpointing.py`` (core 0.9 to 0.19) and the older ``megatron/
checkpointing.py``. Covers TP, PP (even, uneven, custom), virtual pipeline chunks, EP and ETP in any
combination, mcore and pre-mcore names, and the three optimizer layouts. Tensor names come out in
one spelling (see ``shardio/megatron/names.py``), QKV still interleaved by group and the vocabulary
still padded: undoing that is the business of the naming layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import FormatError, UnsupportedError
from ..checkpoint import Checkpoint
from ..layout import Layout
from ..megatron.merge import (
    EMBEDDING,
    HEAD,
    RankPart,
    World,
    assemble,
    collect,
    layer_offsets,
)
from ..megatron.names import canonical, expert_of, tensors_of
from ..megatron.optimizer import read_optimizer, with_masters
from ..megatron.ranks import (
    MODEL_FILES,
    TRACKER,
    RankFile,
    is_rank_folder,
    open_ranks,
    rank_folders,
)
from ..megatron.settings import Sizes, number
from ..records import StoredTensor
from ..registry import Format, OpenOptions
from ..source import FileSource
from ..state_checkpoint import model_files
from ..stored import lazy, plain

_ITERATION = re.compile(r"^iter_(\d+)$")


def detect(path: Path) -> Path | None:
    """Recognise a rank file, a rank folder, an iteration folder, or the run's folder."""
    try:
        if path.is_file():
            if path.name not in (*MODEL_FILES, "distrib_optim.pt"):
                return None
            return path.parent.parent if is_rank_folder(path.parent) else path.parent
        if is_rank_folder(path) and rank_folders(path.parent):
            return path.parent
        if rank_folders(path):
            return path
        latest = tracked(path)
        if latest is not None and latest.is_dir() and rank_folders(latest):
            return latest
        return path if any((path / name).is_file() for name in MODEL_FILES) else None
    except OSError:
        return None


def tracked(folder: Path) -> Path | None:
    """Return the folder that the tracker file names: ``iter_0000010`` or ``release``."""
    tracker = folder / TRACKER
    if not tracker.is_file() or tracker.stat().st_size > 64:
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        return folder / "release"
    return folder / f"iter_{int(text):07d}" if text.isdigit() else None


def open_legacy(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a folder of ``mp_rank_*``. Reads the pickles of all ranks, no tensor bytes.

    Raises:
        FormatError: missing, mixed, swapped or damaged rank files.
        LayoutError: parts that do not fit together.
        UnsupportedError: FP8 tensor objects, tensors whose cut is unknown.
    """
    files, sizes = open_ranks(root)
    parts = [part for f in files for part in _parts(f)]
    _check_chunks(files, sizes)
    _check_ends(parts, sizes, files)
    args = files[0].args
    world = World(
        sizes=sizes,
        args=args,
        version=_checkpoint_version(files[0]),
        offsets=layer_offsets(parts, sizes),
        local_experts=_local_experts(parts, sizes, args),
        tied=args.get("untie_embeddings_and_output_weights", not _legacy_tied(parts)) is False,
    )
    held = collect(parts, world)
    whole = assemble(held, world)
    if not whole.tensors:
        raise FormatError(f"{files[0].path}: its model holds no tensors")
    states = read_optimizer(files, parts, world)
    config, assets = model_files(root, options)
    step = files[0].root.get("iteration")
    return Checkpoint(
        path=root,
        format="megatron",
        version=_version(files[0]),
        naming="megatron",
        weights=whole.tensors,
        optimizer=with_masters(states.tensors, whole.tensors),
        step=step if isinstance(step, int) else None,
        config=config,
        args=args,
        scalars=states.scalars,
        layout=Layout(
            format="megatron",
            tp=sizes.tp,
            pp=sizes.pp,
            vpp=len(files[0].chunks),
            ep=sizes.ep,
            etp=sizes.etp if sizes.etp != sizes.tp else None,
            cp=number(args, "context_parallel_size") or 1,
            dp=number(args, "data_parallel_size") or 1,
        ),
        placements=whole.placements,
        replicas=whole.replicas,
        tied={HEAD: EMBEDDING} if world.tied and EMBEDDING in whole.tensors else {},
        assets=assets,
        warnings=(*tracker_warnings(root), *states.warnings),
    )


def _parts(file: RankFile) -> list[RankPart]:
    source = FileSource.of(file.path)
    parts = []
    for chunk, model in enumerate(file.chunks):
        tensors = {}
        for name, value in tensors_of(model):
            if not isinstance(value, StoredTensor):
                raise UnsupportedError(
                    f"{file.path}: {name} is {value!r}, not a plain tensor (an FP8 or quantized "
                    "parameter); save the model in bf16"
                )
            tensors[name] = lazy(value, source)
        where = str(file.path) + (f" (model{chunk})" if chunk or "model0" in file.root else "")
        parts.append(RankPart(file.tp, file.pp, file.ep, chunk, where, tensors))
    return parts


def _check_chunks(files: Sequence[RankFile], sizes: Sizes) -> None:
    for f in files:
        if len(f.chunks) != len(files[0].chunks):
            raise FormatError(
                f"{f.path}: has {len(f.chunks)} virtual pipeline chunks, {files[0].path} has "
                f"{len(files[0].chunks)}"
            )
    if sizes.vpp > 1 and sizes.vpp != len(files[0].chunks):
        raise FormatError(
            f"{files[0].path}: has {len(files[0].chunks)} model chunks, its args say "
            f"virtual_pipeline_model_parallel_size={sizes.vpp}"
        )


def _check_ends(parts: Sequence[RankPart], sizes: Sizes, files: Sequence[RankFile]) -> None:
    """Stages in the wrong folders show at the ends of the pipeline, whoever wrote them."""
    ends = (("embedding.", 0, 0), ("decoder.final_layernorm.", sizes.pp - 1, -1))
    for prefix, stage, chunk in ends:
        at = {(p.pp, p.chunk) for p in parts for n in p.tensors if canonical(n).startswith(prefix)}
        expected = (stage, chunk % len(files[0].chunks))
        if at and expected not in at:
            raise FormatError(
                f"{files[0].path.parent.parent}: {prefix}* lies in pipeline stage {min(at)[0]}, "
                f"expected in {stage}: rank folders were renamed or swapped"
            )


def _local_experts(parts: Sequence[RankPart], sizes: Sizes, args: Mapping[str, object]) -> int:
    """Experts per expert rank: from the args, else from the routers, else counted."""
    total = number(args, "num_experts")
    highest = -1
    for part in parts:
        for name, tensor in part.tensors.items():
            if total is None and name.endswith("router.weight"):
                total = tensor.shape[0]
            if "experts" in name:
                highest = max(highest, expert_of(canonical(name)) or 0)
    return total // sizes.ep if total else highest + 1


def _legacy_tied(parts: Sequence[RankPart]) -> bool:
    """Without args: the pre-mcore tree names a tied head, or has none."""
    names = {canonical(n) for p in parts for n in p.tensors}
    return HEAD not in names or any(
        "word_embeddings_for_head" in n for p in parts for n in p.tensors
    )


def _checkpoint_version(file: RankFile) -> float:
    """3 today; the oldest pre-mcore files do not say and mean 0."""
    oldest = "model" in file.root and not _is_mcore(file)
    version = file.root.get("checkpoint_version", 0 if oldest else 3)
    if not isinstance(version, int | float) or not 0 <= version < 100:
        raise FormatError(f"{file.path}: checkpoint_version is {plain(version)!r}")
    return float(version)


def _version(file: RankFile) -> str:
    names = "" if _is_mcore(file) else " (pre-mcore names)"
    return f"checkpoint_version {_checkpoint_version(file):g}{names}"


def _is_mcore(file: RankFile) -> bool:
    return not any("language_model" in str(n) for n in file.chunks[0]) or any(
        "decoder.layers" in str(n) for n in file.chunks[0]
    )


def tracker_warnings(root: Path) -> list[str]:
    """Warn when the folder is newer than the last save that was finished."""
    m = _ITERATION.match(root.name)
    latest = tracked(root.parent) if m else None
    newest = _ITERATION.match(latest.name) if latest is not None else None
    if m and newest and int(m[1]) < int(newest[1]) and not (latest and _holds_files(latest)):
        return [
            f"{root.parent / TRACKER} names {newest[0]}, which is not there: {root.name} is an "
            "older save"
        ]
    if m and newest and int(m[1]) > int(newest[1]):
        return [
            f"{root.name} is newer than the last finished save ({root.parent / TRACKER} says "
            f"{int(newest[1])}): this save may be incomplete"
        ]
    return []


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(p.is_file() for p in folder.rglob("*"))


FORMAT = Format(
    name="megatron",
    title="Megatron-LM (torch, mp_rank_*)",
    detect=detect,
    open=open_legacy,
    rank=30,
)
