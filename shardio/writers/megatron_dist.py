"""``--to megatron-dist``: Megatron-Core's ``torch_dist`` format (core 0.16; 0.15 to 0.19 read it).

A DCP with global keys (layers and experts stacked), ``common.pt`` with args and settings, and
``metadata.json``. Pieces are cut as the layout's ranks would write them; Megatron loads them under
any other. ``--zero-stage 1`` writes the distributed optimizer as ``fully_reshardable``. Source:
``megatron/core/dist_checkpointing``, ``sharded_state_dict`` of the modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..box import Index
from ..checkpoint import Checkpoint, Tensors
from ..chunked import zeros
from ..dcp_plan import DcpPlan, Piece
from ..layout import Layout
from ..megatron.container import COMMON, MARK
from ..megatron.divide import Division, divide
from ..megatron.names import expert_of, is_expert, is_parameter, layer_of
from ..megatron.rank_optimizer import OptimizerPlan, optimizer_plan
from ..megatron.ranks import TRACKER
from ..megatron.run_state import Run, counters, run_of, saved_args
from ..placement import Fused, Placement, Replicate, Shard, shard_range
from ..safetensors_plan import plan_bytes, plan_json
from ..stream import OutFile
from ..tensor import LazyTensor
from ..torchzip_plan import plan_torch_file
from ..training_state import MASTER
from . import Planned, Writer
from ._common import assets
from .megatron import check_axes

_SHARDING = "fully_reshardable"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the folder of a checkpoint with Megatron names.

    Raises:
        LayoutError: sizes that do not divide the model.
        UnsupportedError: tensors that Megatron's GPT models do not have.
    """
    check_axes(layout)
    division = divide(ckpt, layout)
    run = run_of(ckpt, division)
    dcp = DcpPlan(layout.tp, layout.dp)
    keys = _keys(division)
    for key, stacked in keys.items():
        _add(dcp, key, stacked, division, division.weights)
    for key, stacked in keys.items():
        for item in dict.fromkeys(_extra_items(division, key, stacked)):
            dcp.value((item,), [None])
    common = {"args": saved_args(run, 0, "torch_dist"), **counters(run)}
    content: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if run.training:
        common["optimizer"] = _optimizer(run, dcp, keys)
        if run.distributed:
            content["distrib_optim_sharding_type"] = _SHARDING
    common["content_metadata"] = content
    inside = [
        *dcp.files(),
        plan_torch_file(COMMON, common),
        plan_json(MARK, _BACKEND),
    ]
    files = [OutFile(f"{run.folder}/{f.name}", f.size, f.parts) for f in inside]
    files.append(plan_bytes(TRACKER, run.tracker.encode()))
    return Planned((*files, *assets(ckpt)), tuple(run.notes))


# -- keys and pieces ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Stacked:
    """The weights that one key holds.

    Attributes:
        sizes: leading dims (layers, experts).
        members: canonical name to its place in them.
    """

    sizes: Index
    members: dict[str, Index] = field(default_factory=dict)


def _keys(division: Division) -> dict[str, _Stacked]:
    """Keys of the weights, in the order of the model."""
    found: dict[str, _Stacked] = {}
    for name in division.weights:
        key, at, sizes = division.spelling.key(name, division.experts)
        found.setdefault(key, _Stacked(sizes)).members[name] = at
    return found


def _add(dcp: DcpPlan, key: str, stacked: _Stacked, division: Division, tensors: Tensors) -> None:
    """Add what a key holds of a state; weights without that state are zeros."""
    here = [tensors[n] for n in stacked.members if n in tensors]
    if not here:
        return
    pieces: list[Piece] = []
    for name, at in stacked.members.items():
        tensor = tensors.get(name)
        if tensor is None:
            tensor = zeros(division.weights[name].shape, here[0].dtype)
        pieces += _pieces(division, name, at, tensor)
    dcp.pieces((key,), (*stacked.sizes, *here[0].shape), here[0].dtype, pieces)


def _pieces(division: Division, name: str, at: Index, tensor: LazyTensor) -> Iterator[Piece]:
    """What each rank stores of one weight."""
    cut = division.cuts[name]
    expert = expert_of(name)
    world = division.etp if is_expert(name) else division.layout.tp
    first = _stage(division, name) * division.stage_size
    if expert is not None:
        first += expert // (division.experts // division.layout.ep) * world
    for rank in range(1 if isinstance(cut, Replicate) else world):
        for lo, hi in _boxes(cut, tensor.shape, rank, world):
            region = [slice(a, b) for a, b in zip(lo, hi, strict=True)]
            piece = tensor.slice(region)
            yield first + rank, (*at, *lo), piece.reshape((*[1] * len(at), *piece.shape))


def _stage(division: Division, name: str) -> int:
    """Pipeline stage that stores a weight."""
    layer = layer_of(name)
    if layer is None:
        return 0 if name.startswith("embedding.") else division.stages.pp - 1
    return next(pp for (pp, _), own in division.stages.layers().items() if layer in own)


def _boxes(cut: Placement, shape: Index, rank: int, world: int) -> Iterator[tuple[Index, Index]]:
    """What a rank holds, as boxes of the whole: gate and up lie apart."""
    dim: int = 0
    widths: Index = shape[:1] or (1,)
    if isinstance(cut, Shard):
        dim, widths = cut.dim, (shape[cut.dim],)
    elif isinstance(cut, Fused):
        dim, widths = cut.dim, cut.widths
    else:
        rank, world = 0, 1
    start = 0
    for width in widths:
        lo, hi = [0] * len(shape), list(shape)
        if shape:
            first, last = shard_range(width, rank, world, even=True)
            lo[dim], hi[dim] = start + first, start + last
        yield tuple(lo), tuple(hi)
        start += width


def _extra_items(division: Division, key: str, stacked: _Stacked) -> Iterator[str]:
    """Keys of the (empty) extra states beside a weight's key: one per layer and expert."""
    if key.startswith("output_layer."):
        return
    sizes = ".".join(map(str, stacked.sizes or (1,)))
    for extra in division.spelling.extra(key):
        for at in stacked.members.values():
            yield f"{extra}/shard_{'.'.join(map(str, at or (0,)))}_{sizes}"


# -- optimizer ------------------------------------------------------------------------------------


def _optimizer(run: Run, dcp: DcpPlan, keys: dict[str, _Stacked]) -> Any:
    """Add the optimizer's tensors; returns what belongs into ``common.pt``."""
    optimizer = optimizer_plan(run)
    master = "param" if run.distributed else "fp32_param"
    for state, tensors in optimizer.states.items():
        if state == MASTER and optimizer.single and not run.distributed:
            continue  # the weights themselves
        for key, stacked in keys.items():
            if is_parameter(key):
                own = f"optimizer.state.{master if state == MASTER else state}.{key}"
                _add(dcp, own, stacked, run.division, tensors)
    parts = [_settings(run, optimizer, k) for k in range(len(optimizer.kinds))]
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _settings(run: Run, optimizer: OptimizerPlan, part: int) -> dict[str, Any]:
    """Settings of one chained optimizer; ranks add their parameters."""
    counts = run.distributed or optimizer.fused
    groups = [optimizer.group(kind, counts=counts) for kind in optimizer.kinds[part]]
    if run.distributed:
        return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": _SHARDING}
    step = np.array(optimizer.training.step, np.float32)
    state = {} if optimizer.fused else {"common_step": step}
    inner = {"state": state, "param_groups": groups}
    return inner if optimizer.single else {"optimizer": inner}


WRITER = Writer("megatron-dist", "Megatron-LM (torch_dist)", "megatron", plan)
