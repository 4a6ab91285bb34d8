"""Megatron-LM's distributed checkpoints: ``torch_dist``, ``zarr`` and ``torch_dcp`` (FSDP2).

Source: ``megatron/core/dist_checkpointing`` and ``megatron/training/checkpointing.py`` (core 0.4 to
0.19). Keys and shapes are global, so the parallel sizes of the run do not matter; what is left to
do is to take layers and experts apart. Names come out as from the legacy format (see
``shardio/megatron/names.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import FormatError, counted
from ..checkpoint import Checkpoint, Tensors
from ..coverage import prove
from ..dcp_metadata import METADATA, metadata_files
from ..layout import Layout
from ..megatron.container import COMMON, MARK, Container, backend_of, open_container
from ..megatron.dist_optimizer import OPTIMIZER, read_optimizer
from ..megatron.merge import EMBEDDING, HEAD
from ..megatron.optimizer import with_masters
from ..megatron.ranks import TRACKER
from ..megatron.settings import Sizes, number, parallel_sizes, plain_args
from ..megatron.stacked import unstack
from ..registry import Format, OpenOptions
from ..source import open_file
from ..state_checkpoint import model_files
from .megatron import tracked, tracker_warnings

_MODEL = re.compile(r"^(?:model\.|module\.)*(?:embedding|decoder|encoder|output_layer|mtp)\.")
_LOOK = 1 << 20  # bytes of .metadata in which a known name must occur
_BUFFERS = re.compile(r"(?:^|\.)(?:rng_state|rerun_state_machine_state|dataloader)")


def detect(path: Path) -> Path | None:
    """Recognise an iteration folder, a file in it, or the run's folder."""
    try:
        if path.is_file():
            inside = path.suffix == ".distcp" or path.name in (METADATA, MARK, COMMON)
            return path.parent if inside and _backend(path.parent) else None
        if _backend(path):
            return path
        latest = tracked(path)
        return latest if latest is not None and latest.is_dir() and _backend(latest) else None
    except OSError:
        return None


def _backend(folder: Path) -> str | None:
    """The container's name; plain DCP counts when it lies in a run folder of Megatron, or holds its
    names (a copied iteration folder).
    """
    known = backend_of(folder)
    files = metadata_files(folder) if known is None else []
    if files and ((folder.parent / TRACKER).is_file() or _has_our_names(files[0])):
        return "torch_dcp"
    return known


def _has_our_names(metadata: Path) -> bool:
    with open_file(metadata) as file:
        start = file.read(_LOOK)
    return b"embedding.word_embeddings.weight" in start or b"_attention.linear_qkv." in start


def open_dist(root: Path, options: OpenOptions) -> Checkpoint:
    """Open an iteration folder. Reads metadata and the common state, no tensor bytes.

    Raises:
        FormatError: missing or damaged files, tensors with holes.
        LayoutError: stacks that contradict the number of layers.
        UnsupportedError: unknown backends, compressed arrays.
    """
    backend = _backend(root)
    if backend is None:
        raise FormatError(f"{root}: is no distributed checkpoint of Megatron-LM (no {MARK})")
    container = open_container(root, backend)
    args = plain_args(container.common.get("args"))
    sizes = parallel_sizes(args)
    model = {k: t for k, t in container.tensors.items() if _MODEL.match(k)}
    if not model:
        raise FormatError(f"{root}: holds no model tensors (keys such as decoder.layers...)")
    weights = unstack(model, sizes.layers)
    _prove(weights, root, sizes)
    states = read_optimizer(container, weights, args, sizes)
    for state, tensors in states.tensors.items():
        prove({f"{state}.{n}": t for n, t in tensors.items()}, root)
    config, assets = model_files(root, options)
    step = container.common.get("iteration")
    tied = HEAD not in weights and EMBEDDING in weights
    return Checkpoint(
        path=root,
        format="megatron_dist",
        version=backend,
        naming="megatron",
        weights=weights,
        optimizer=with_masters(states.tensors, weights),
        step=step if isinstance(step, int) else None,
        config=config,
        args=args,
        scalars=states.scalars,
        layout=_layout(sizes, args),
        tied={HEAD: EMBEDDING} if tied else {},
        assets=assets,
        warnings=(
            *container.warnings,
            *tracker_warnings(root),
            *_unknown(container, args),
            *states.warnings,
        ),
    )


def _prove(weights: Tensors, root: Path, sizes: Sizes) -> None:
    try:
        prove(weights, root)
    except FormatError as e:
        if sizes.etp > 1 and sizes.ep > 1 and ".experts." in str(e):
            raise FormatError(
                f"{e}. Some versions of Megatron save only 1/{sizes.etp} of the experts with "
                "expert tensor parallelism (NVIDIA/Megatron-LM#1836): the rest was never written"
            ) from None
        raise


def _layout(sizes: Sizes, args: Mapping[str, object]) -> Layout:
    return Layout(
        format="megatron_dist",
        tp=sizes.tp,
        pp=sizes.pp,
        vpp=sizes.vpp,
        ep=sizes.ep,
        etp=sizes.etp if sizes.etp != sizes.tp else None,
        cp=number(args, "context_parallel_size") or 1,
        dp=number(args, "data_parallel_size") or 1,
    )


def _unknown(container: Container, args: Mapping[str, object]) -> list[str]:
    notes = []
    if not args:
        notes.append(
            "no Megatron args in it (a checkpoint of Megatron-Bridge or NeMo?): the model's config "
            "must come from elsewhere (--config)"
        )
    other = [
        key
        for key in container.tensors
        if not (_MODEL.match(key) or OPTIMIZER.match(key) or _BUFFERS.search(key))
    ]
    if other:
        notes.append(
            f"{counted(len(other), 'tensor is', 'tensors are')} "
            f"no part of a GPT model: {', '.join(other[:4])}"
        )
    return notes


FORMAT = Format(
    name="megatron_dist",
    title="Megatron-LM (torch_dist, zarr, torch_dcp)",
    detect=detect,
    open=open_dist,
    rank=30,
)
