"""The default ``dp_reshardable`` optimizer layout: flat buffers per model-parallel rank, no names.

Keys ``optimizer.distributed.dp_group_idx_M.gbuf_idx_G.dtype_(..).bucket_idx_B.<state>``; M counts
model-parallel ranks (tp fastest), G model chunks; experts have an optimizer of their own
(``chained_1.``). Which parameter lies where follows from the order of the modules (see
``module_order``); the saved chunks end at every parameter's end, so a wrong guess is noticed.
Source: ``megatron/core/optimizer/distrib_optimizer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...errors import FormatError, LayoutError, UnsupportedError, counted
from ..box import Index
from ..checkpoint import Tensors
from ..chunked import Chunked
from ..tensor import LazyTensor
from .buffers import Param, spans_of, unflatten
from .cuts import cuts_of
from .merge import EMBEDDING, HEAD, RankPart, World, assemble, collect
from .module_order import Order, dense_orders, expert_orders
from .names import expert_of, is_expert, is_parameter, layer_of, shift_expert
from .settings import Sizes
from .stages import stages_of_args

BUFFER = re.compile(
    r"^(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\."
    r"(?:gbuf_idx_(\d+)\.dtype_\((.+?), (.+?)\)\.bucket_idx_(\d+)\.(param|exp_avg|exp_avg_sq)$)?"
)
_STATES = {"param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

States = Mapping[str, Mapping[int, Chunked]]  # state to bucket number to flat tensor


@dataclass(frozen=True, slots=True)
class _Group:
    """Flat buffers of one model chunk on one model-parallel rank: dense ones, or its experts'."""

    expert: bool
    tp: int
    ep: int
    pp: int
    chunk: int
    states: dict[str, dict[int, Chunked]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        kind = f"experts of rank {self.ep}" if self.expert else "dense parameters"
        return f"flat buffer of the {kind}, tensor rank {self.tp}, stage {self.pp}"


def from_buffers(
    tensors: Mapping[str, Chunked], weights: Tensors, args: Mapping[str, object], sizes: Sizes
) -> dict[str, dict[str, LazyTensor]]:
    """Return the states by canonical weight name.

    Raises:
        UnsupportedError: models or layouts whose buffer order is not known with certainty.
    """
    tied = HEAD not in weights
    experts = 1 + max((expert_of(name) or 0 for name in weights), default=0)
    local = max(1, experts // sizes.ep)
    world = World(sizes, args, 3.0, {}, local, tied)
    parts: dict[str, list[RankPart]] = {}
    for group in _groups(tensors, sizes):
        names = [
            n
            for n in _stage(weights, group.pp, group.chunk, args, sizes, tied)
            if is_expert(n) == group.expert
            and (not group.expert or (expert_of(n) or 0) // local == group.ep)
        ]
        found = _assign(group, names, weights, world)
        for state, named in found.items():
            part = RankPart(group.tp, group.pp, group.ep, group.chunk, group.where, named)
            parts.setdefault(state, []).append(part)
    try:
        whole = {s: assemble(collect(ranks, world), world).tensors for s, ranks in parts.items()}
    except (FormatError, LayoutError) as e:
        raise UnsupportedError(str(e)) from e
    for state, named in whole.items():
        lost = [n for n in weights if is_parameter(n) and n not in named]
        if lost:
            raise UnsupportedError(
                f"flat buffers: no {state} of {counted(len(lost), 'tensor')}, {lost[0]}..."
            )
    return whole


def _groups(tensors: Mapping[str, Chunked], sizes: Sizes) -> list[_Group]:
    """Sort the keys; the first number counts (tp, pp), for experts (etp, ep, pp), first fastest."""
    found: dict[tuple[int, int, int], _Group] = {}
    types = set()
    for key, tensor in tensors.items():
        m = BUFFER.match(key)
        if not m:
            continue
        if m[3] is None or tensor.ndim != 1:
            raise UnsupportedError(f"optimizer key {key}")
        types.add(m[4])
        expert, rank, chunk = int(m[1] or 0) == 1, int(m[2]), int(m[3])
        tp = sizes.etp if expert else sizes.tp
        ep = sizes.ep if expert else 1
        group = _Group(expert, rank % tp, rank // tp % ep, rank // (tp * ep), chunk)
        if int(m[1] or 0) > 1 or group.pp >= sizes.pp or chunk >= sizes.vpp:
            raise UnsupportedError(f"optimizer key {key} (with PP={sizes.pp}, VPP={sizes.vpp})")
        group = found.setdefault((int(expert), rank, chunk), group)
        group.states.setdefault(_STATES[m[7]], {})[int(m[6])] = tensor
    if len(types) > 1:
        raise UnsupportedError(f"flat buffers of several element types: {', '.join(sorted(types))}")
    return list(found.values())


def _stage(
    weights: Tensors,
    pp: int,
    chunk: int,
    args: Mapping[str, object],
    sizes: Sizes,
    tied: bool,
) -> Iterator[str]:
    """Names of the parameters of one model chunk, in no particular order."""
    own = stages_of_args(args, sizes).layers()[pp, chunk]
    first = pp == 0 and chunk == 0
    last = pp == sizes.pp - 1 and chunk == sizes.vpp - 1
    for name in weights:
        layer = layer_of(name)
        here = layer in own if layer is not None else first if "embedding" in name else last
        if here and is_parameter(name):
            yield name
    if tied and last and sizes.pp > 1:
        yield HEAD


def _assign(
    group: _Group, names: Sequence[str], weights: Tensors, world: World
) -> dict[str, dict[str, LazyTensor]]:
    """Name the pieces of a buffer by the order whose parameters end where saved chunks end."""
    args = world.args
    for order in expert_orders(args) if group.expert else dense_orders(args):
        shapes = _local_shapes(group, names, weights, world, order)
        ordered = order.arrange(shapes, world.local_experts)
        if ordered is None:
            continue
        params = [Param(n, s, np.dtype(np.float32), group.chunk, False) for n, s in ordered]
        named = {state: _fit(buckets, params) for state, buckets in group.states.items()}
        if all(named.values()):
            return {state: found for state, found in named.items() if found is not None}
    raise UnsupportedError(f"{group.where}: no known order of modules fits the saved chunks")


def _local_shapes(
    group: _Group, names: Sequence[str], weights: Tensors, world: World, order: Order
) -> dict[str, Index]:
    """Shapes on a rank, by names with local expert numbers."""
    count = world.sizes.etp if group.expert else world.sizes.tp
    whole = {n: weights[EMBEDDING if n == HEAD and n not in weights else n] for n in names}
    whole_shapes = {name: tensor.shape for name, tensor in whole.items()}
    shapes = {}
    try:
        cuts = cuts_of(whole_shapes, count, world.args, latent_rows=order.cuts_latent)
        for name, tensor in whole.items():
            own = cuts[name].cut(tensor, 0, count).shape
            shapes[shift_expert(name, -group.ep * world.local_experts)] = own
    except LayoutError as e:
        raise UnsupportedError(f"{group.where}: {e}") from e
    return shapes


def _fit(buckets: Mapping[int, Chunked], ordered: Sequence[Param]) -> dict[str, LazyTensor] | None:
    """Fill the buckets with the parameters in order; None when boundaries do not coincide."""
    out: dict[str, LazyTensor] = {}
    rest = list(ordered)
    for _, flat in sorted(buckets.items()):
        edges = {edge for c in flat.chunks for edge in (c.lo[0], c.hi[0])}
        taken: list[Param] = []
        for param, start, end in spans_of(rest):
            if end > flat.shape[0]:
                break
            if start not in edges or end not in edges:
                return None
            taken.append(param)
        out |= unflatten(flat, taken)
        rest = rest[len(taken) :]
    return out if not rest else None
