"""The default ``dp_reshardable`` optimizer layout: flat buffers per model-parallel rank, no names.

Keys ``optimizer.distributed.dp_group_idx_M.gbuf_idx_G.dtype_(..).bucket_idx_B.<state>``; M counts
model-parallel ranks (tp fastest), G model chunks. Which parameter lies where follows from the order
of the modules, which depends on the layer spec; the saved chunks end at every parameter's end, so a
wrong guess is noticed. Source: ``megatron/core/optimizer/distrib_optimizer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ...errors import LayoutError, UnsupportedError
from ..box import Index
from ..checkpoint import Tensors
from ..chunked import Chunked
from ..tensor import LazyTensor
from .buffers import Param, spans_of, unflatten
from .cuts import Facts, placement_of
from .merge import EMBEDDING, HEAD, RankPart, World, assemble, collect
from .names import is_parameter, layer_of
from .settings import Sizes, number

BUFFER = re.compile(
    r"^(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_(\d+)\."
    r"(?:gbuf_idx_(\d+)\.dtype_\((.+?), (.+?)\)\.bucket_idx_(\d+)\.(param|exp_avg|exp_avg_sq)$)?"
)
_STATES = {"param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

# Order of a layer's parameters, by what comes after ``decoder.layers.N.``. Transformer Engine
# fuses norms into the linear behind them.
_LOCAL = (
    "input_layernorm", "self_attention.linear_proj", "self_attention.linear_qkv",
    "self_attention.q_layernorm", "self_attention.k_layernorm", "pre_mlp_layernorm",
    "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
_FUSED = (
    "self_attention.linear_proj", "input_layernorm", "self_attention.linear_qkv",
    "self_attention.q_layernorm", "self_attention.k_layernorm", "pre_mlp_layernorm",
    "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip

Buckets = dict[tuple[int, int], dict[str, dict[int, Chunked]]]  # (M, G) to state to bucket


def from_buffers(
    tensors: Mapping[str, Chunked], weights: Tensors, args: Mapping[str, object], sizes: Sizes
) -> dict[str, dict[str, LazyTensor]]:
    """Return the states by canonical weight name.

    Raises:
        UnsupportedError: models or layouts whose buffer order is not known with certainty.
    """
    if sizes.ep > 1 or any(".mlp.experts." in name for name in weights):
        raise UnsupportedError("flat buffers of a model with experts (dp_reshardable)")
    buckets = _buckets(tensors)
    tied = HEAD not in weights
    parts: dict[str, list[RankPart]] = {}
    for (group, gbuf), states in buckets.items():
        tp, pp = group % sizes.tp, group // sizes.tp
        if pp >= sizes.pp or gbuf >= sizes.vpp:
            raise UnsupportedError(f"buffer {gbuf} of group {group} for PP={sizes.pp}")
        names = list(_stage(weights, pp, gbuf, args, sizes, tied))
        split = _assign(states, _params(names, weights, args, sizes, gbuf), args)
        for state, found in split.items():
            where = f"dp_group_idx_{group}.gbuf_idx_{gbuf}"
            parts.setdefault(state, []).append(RankPart(tp, pp, 0, gbuf, where, found))
    world = World(sizes, args, 3.0, {}, 0, tied)
    try:
        return {s: assemble(collect(ranks, world), world).tensors for s, ranks in parts.items()}
    except LayoutError as e:
        raise UnsupportedError(str(e)) from e


def _buckets(tensors: Mapping[str, Chunked]) -> Buckets:
    found: Buckets = {}
    types = set()
    for key, tensor in tensors.items():
        m = BUFFER.match(key)
        if not m:
            continue
        if m[2] is None or tensor.ndim != 1:
            raise UnsupportedError(f"optimizer key {key}")
        types.add(m[3])
        states = found.setdefault((int(m[1]), int(m[2])), {})
        states.setdefault(_STATES[m[6]], {})[int(m[5])] = tensor
    if len(types) > 1:
        raise UnsupportedError(
            f"flat buffers of several element types ({', '.join(sorted(types))})"
        )
    return found


def _stage(
    weights: Tensors,
    pp: int,
    chunk: int,
    args: Mapping[str, object],
    sizes: Sizes,
    tied: bool,
) -> Iterator[str]:
    """Names of the parameters of one model chunk, in no particular order."""
    own = _layers(args, sizes)[pp, chunk]
    first = pp == 0 and chunk == 0
    last = pp == sizes.pp - 1 and chunk == sizes.vpp - 1
    for name in weights:
        layer = layer_of(name)
        here = layer in own if layer is not None else first if "embedding" in name else last
        if here and is_parameter(name):
            yield name
    if tied and last and sizes.pp > 1:
        yield HEAD


def _layers(args: Mapping[str, object], sizes: Sizes) -> dict[tuple[int, int], range]:
    """(stage, chunk) to its layers; even stages, or shorter first and last ones."""
    total, chunks = sizes.layers or 0, sizes.pp * sizes.vpp
    if not 0 < chunks <= total:
        raise UnsupportedError(f"{total} layers on {chunks} pipeline chunks")
    first = number(args, "decoder_first_pipeline_num_layers")
    last = number(args, "decoder_last_pipeline_num_layers")
    if args.get("pipeline_model_parallel_layout"):
        raise UnsupportedError("flat buffers with a custom pipeline layout")
    if first is None and last is None:
        # embedding and loss may each count as a layer of the first and last chunk
        ends = [bool(args.get(f"account_for_{x}_in_pipeline_split")) for x in ("embedding", "loss")]
        counts = [(total + sum(ends)) // chunks] * chunks
        counts[0] -= ends[0]
        counts[-1] -= ends[1]
    elif sizes.vpp > 1:
        raise UnsupportedError("flat buffers with uneven virtual pipeline stages")
    else:
        given = (first is not None) + (last is not None)
        middle = (total - (first or 0) - (last or 0)) // max(1, chunks - given)
        counts = [middle] * chunks
        counts[0] = middle if first is None else first
        counts[-1] = middle if last is None else last
    if sum(counts) != total:
        raise UnsupportedError(f"{total} layers do not divide over the pipeline stages")
    out, at = {}, 0
    for k, n in enumerate(counts):
        out[k % sizes.pp, k // sizes.pp] = range(at, at + n)
        at += n
    return out


def _params(
    names: Sequence[str],
    weights: Tensors,
    args: Mapping[str, object],
    sizes: Sizes,
    chunk: int,
) -> list[Param]:
    whole = {n: weights[EMBEDDING if n == HEAD and n not in weights else n] for n in names}
    shapes: dict[str, Index] = {}
    for name, tensor in whole.items():  # what a rank holds of the MLP tells how fc1 is cut
        rows = tensor.shape[0] // sizes.tp
        if ".linear_fc1." in name:
            shapes[name] = (rows, *tensor.shape[1:])
        elif name.endswith(".linear_fc2.weight"):
            shapes[name] = (tensor.shape[0], tensor.shape[1] // sizes.tp)
    params = []
    for name, tensor in whole.items():
        try:
            placement = placement_of(Facts(name, sizes.tp, shapes, args))
            local = placement.cut(tensor, 0, sizes.tp).shape
        except LayoutError as e:
            raise UnsupportedError(f"flat buffers: {e}") from e
        params.append(Param(name, local, tensor.dtype, chunk, False))
    return params


def _order(name: str, spec: Sequence[str]) -> tuple[int, int, int, int]:
    """Position of a parameter in ``named_parameters()``; raises KeyError for unknown modules."""
    bias = int(name.endswith(".bias"))
    layer = layer_of(name)
    if layer is not None:
        module = name.split(".", 3)[3].rpartition(".")[0]
        if module not in spec:
            raise KeyError(module)
        return 1, layer, spec.index(module), bias
    outside = ("embedding.word", "embedding.position", "embedding.tokentype")
    if name.startswith("embedding."):
        return 0, next((k for k, p in enumerate(outside) if name.startswith(p)), 3), 0, bias
    return 2, int(name.startswith("output_layer")), 0, bias


def _assign(
    states: Mapping[str, Mapping[int, Chunked]],
    params: Sequence[Param],
    args: Mapping[str, object],
) -> dict[str, dict[str, LazyTensor]]:
    """Name the pieces of one buffer by the spec whose parameters end where saved chunks end."""
    specs = (_LOCAL, _FUSED) if args.get("transformer_impl") == "local" else (_FUSED, _LOCAL)
    reason = "no known order of modules fits the saved chunks"
    for spec in specs:
        try:
            ordered = sorted(params, key=lambda p: _order(p.name, spec), reverse=True)
        except KeyError as e:
            reason = f"the order of module {e} is not known"
            continue
        named = {s: _fit(buckets, ordered) for s, buckets in states.items()}
        if all(named.values()):
            return {s: found for s, found in named.items() if found is not None}
    raise UnsupportedError(f"flat buffers: {reason}")


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
