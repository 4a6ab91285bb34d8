"""``--to meta``: Meta's ``consolidated.NN.pth`` and ``params.json``, one file per tp rank.

Rows of ``wq wk wv w1 w3 output`` and columns of ``wo w2`` are cut, norms repeated. With fewer
key/value heads than files neighbours hold the same heads. Token embeddings are cut by rows as in
Llama 3, or by columns as in Llama 1 and 2, which ran with other parallel layers; the rotary base
tells the generation. Source: Meta's ``llama`` and ``llama-models``, and the reader of this format.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ...errors import UnsupportedError
from ..checkpoint import Checkpoint
from ..layout import Layout, demand
from ..placement import shard_range
from ..safetensors_plan import plan_json
from ..tensor import LazyTensor
from ..torchzip_plan import plan_torch_file
from ..training_state import with_aliases
from . import Planned, Writer
from ._common import assets, only_axes

_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
_COLUMNS = ("wo", "w2")
_LLAMA_3_BASE = 500000  # rotary base of Llama 3 and later; 10000 before


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the folder.

    Raises:
        LayoutError: axes other than tp, or a tp that does not divide the model.
        UnsupportedError: optimizer states; experts over several files.
    """
    only_axes(layout, "tp")
    if ckpt.optimizer:
        raise UnsupportedError(
            "format 'meta' holds weights only: write with --weights-only, or choose another target"
        )
    weights = with_aliases(ckpt.weights, ckpt.tied)
    _check(weights, ckpt.args, layout.tp)
    files = []
    for rank in range(layout.tp):
        part = OrderedDict((n, _cut(n, t, rank, layout.tp, ckpt.args)) for n, t in weights.items())
        files.append(plan_torch_file(f"consolidated.{rank:02d}.pth", part))
    files.append(plan_json("params.json", dict(ckpt.args)))
    return Planned((*files, *assets(ckpt)))


def _kind(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _dim(name: str, args: Mapping[str, Any]) -> int | None:
    """The dim that tp cuts; None where every file has the whole."""
    kind = _kind(name)
    if kind in _ROWS:
        return 0
    if kind in _COLUMNS:
        return None if name.endswith(".bias") else 1
    if kind == "tok_embeddings":
        return 0 if (args.get("rope_theta") or 0) >= _LLAMA_3_BASE else 1
    return None


def _cut(
    name: str, tensor: LazyTensor, rank: int, world: int, args: Mapping[str, Any]
) -> LazyTensor:
    """What the file of a rank holds."""
    dim = _dim(name, args)
    if dim is None or world == 1:
        return tensor
    if _kind(name) in ("wk", "wv"):
        heads = int(args["n_kv_heads"])
        if heads < world:  # several files share a head
            rank, world = rank // (world // heads), heads
    lo, hi = shard_range(tensor.shape[dim], rank, world, even=True)
    return tensor.slice([slice(None)] * dim + [slice(lo, hi)])


def _check(weights: Mapping[str, LazyTensor], args: Mapping[str, Any], tp: int) -> None:
    """Refuse what cannot be cut, with the nearest sizes that can."""
    if tp == 1:
        return
    if any(".experts." in n for n in weights):
        raise UnsupportedError(
            f"tp={tp}: how Meta's format spreads experts over files is not settled; use --tp 1"
        )
    cut = {
        f"{weights[n].shape[dim]} {'rows' if dim == 0 else 'columns'} of {n}": weights[n].shape[dim]
        for n in weights
        if (dim := _dim(n, args)) is not None and _kind(n) not in ("wk", "wv")
    }
    cut[f"{args['n_heads']} attention heads"] = int(args["n_heads"])
    groups = int(args["n_kv_heads"])

    def problem(size: int) -> str | None:
        for what, n in cut.items():
            if n % size:
                return f"{what} cannot be divided over {size} files"
        if groups % size and size % groups:
            return f"{groups} key/value heads neither divide {size} files nor are divided by them"
        return None

    demand("tp", tp, min(cut.values()), problem)


WRITER = Writer("meta", "Meta consolidated.NN.pth", "meta", plan, resumes=False)
