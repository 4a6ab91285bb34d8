"""``--to hf-dcp``: DCP pieces in safetensors form, as ``HuggingFaceStorageWriter`` saves them.

One ``shard-<rank>-model-00001-of-00001.safetensors`` per rank of a dp x tp mesh, each with the
places of its pieces in ``DCP_SHARDING_INFO``; torch reads and consolidates them. Source:
``torch/distributed/checkpoint/{hf_storage,_hf_utils}.py``. The form is meant for weights; optimizer
states that are asked for lie among them as ``optim.state.<name>.<state>``, the rest of the
optimizer in ``training_state.json``.
"""

from __future__ import annotations

import json

from ..checkpoint import Checkpoint
from ..chunk_grid import cells
from ..layout import Layout
from ..payload import BytesPayload, Payload, TensorPayload
from ..safetensors_header import build_header
from ..stream import OutFile
from ..tensor import LazyTensor
from ..training_file import plan_training_file
from ..training_state import full_precision, training_state, with_aliases
from . import Planned, Writer
from ._common import assets, only_axes

Piece = tuple[str, tuple[int, ...], LazyTensor]  # name, offsets, data


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the pieces for a mesh of dp x tp ranks. Raises LayoutError for other axes."""
    only_axes(layout, "dp", "tp")
    weights = with_aliases(full_precision(ckpt, layout), ckpt.tied)
    tensors = {name: (name, t) for name, t in weights.items()}
    extra = assets(ckpt)
    if ckpt.optimizer:
        for state, states in training_state(ckpt).states.items():
            tensors |= {f"optim.state.{n}.{state}": (n, t) for n, t in states.items()}
        extra.append(plan_training_file(ckpt))
    ranks: dict[int, list[Piece]] = {}
    for turn, (key, (name, tensor)) in enumerate(tensors.items()):
        for cell in cells(name, tensor.shape, tp=layout.tp, dp=layout.dp, turn=turn):
            region = [slice(a, b) for a, b in zip(cell.lo, cell.hi, strict=True)]
            ranks.setdefault(cell.rank, []).append((key, cell.lo, tensor.slice(region)))
    files = [_file(rank, pieces) for rank, pieces in sorted(_dense(ranks).items())]
    return Planned((*files, *extra))


def _dense(ranks: dict[int, list[Piece]]) -> dict[int, list[Piece]]:
    """Ranks that have something, renumbered without holes: readers take a hole for a lost file."""
    return {k: ranks[rank] for k, rank in enumerate(sorted(ranks))}


def _file(rank: int, pieces: list[Piece]) -> OutFile:
    ordered = sorted(pieces, key=lambda p: (-p[2].dtype.itemsize, p[0]))
    places = {name: {"saved_offsets": list(lo)} for name, lo, _ in ordered}
    metadata = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": json.dumps(places),
    }
    header, starts = build_header([(n, t.dtype, t.shape) for n, _, t in ordered], metadata)
    parts: list[tuple[int, Payload]] = [(0, BytesPayload(header))]
    end = len(header)
    for (_, _, tensor), start in zip(ordered, starts, strict=True):
        parts.append((start, TensorPayload(tensor)))
        end = start + tensor.nbytes
    return OutFile(f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", end, tuple(parts))


WRITER = Writer("hf-dcp", "DCP pieces in safetensors", "hf", plan, resumes=False)
