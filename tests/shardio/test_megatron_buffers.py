"""Flat optimizer buffers of dp_reshardable checkpoints: laid out here by the book (parameters in
reverse module order, starts at multiples of 64, gaps as chunks of their own), then named again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
import torch
from mconv.errors import UnsupportedError
from mconv.shardio.chunked import Chunked
from mconv.shardio.megatron.dist_buffers import from_buffers
from mconv.shardio.megatron.settings import Sizes
from mconv.shardio.tensor import LazyTensor, concat, from_array

from .formats.megatron_writer import Model, Plan, make_model, rank_model

KIND = "dtype_(torch.bfloat16, torch.float32)"
TE = {"transformer_impl": "transformer_engine"}


def buckets(tensors: Iterable[torch.Tensor], count: int) -> list[Chunked]:
    """The flat tensors of parameters given in module order."""
    ordered = [t.flatten() for t in tensors][::-1]
    middle = -(-len(ordered) // count)
    out = []
    for start in range(0, len(ordered), middle):
        pieces: list[torch.Tensor] = []
        for flat in ordered[start : start + middle]:
            used = sum(len(x) for x in pieces)
            pieces += [torch.zeros(-used % 64)] * bool(used % 64)
            pieces.append(flat)
        joined = concat([from_array(x.numpy()) for x in pieces])
        assert isinstance(joined, Chunked)
        out.append(joined)
    return out


def keys(prefix: str, rank: int, chunk: int, flats: list[Chunked]) -> dict[str, Chunked]:
    at = f"{prefix}optimizer.distributed.dp_group_idx_{rank}.gbuf_idx_{chunk}.{KIND}.bucket_idx_"
    states = ("param", "exp_avg", "exp_avg_sq")
    return {f"{at}{b}.{s}": flat for b, flat in enumerate(flats) for s in states}


def fused(chunk: Model) -> Model:
    """Transformer Engine's order: a norm comes with the linear behind it."""
    out: Model = {}
    for name, t in chunk.items():
        if name.endswith("linear_qkv.weight"):
            norm = name.replace("self_attention.linear_qkv", "input_layernorm")
            out[norm] = chunk[norm]
        if not name.endswith("input_layernorm.weight"):
            out[name] = t
    return out


def check(found: Mapping[str, Mapping[str, LazyTensor]], model: Model) -> None:
    assert set(found) == {"master", "exp_avg", "exp_avg_sq"}
    for state in found.values():
        assert set(state) == set(model)
        for name, expected in model.items():
            assert np.array_equal(state[name].read(), expected.numpy()), name


def lazy(model: Model) -> dict[str, LazyTensor]:
    return {n: from_array(t.numpy()) for n, t in model.items()}


@pytest.mark.parametrize("count", [1, 2], ids=["one bucket", "two buckets"])
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_dense_stages(impl: str, count: int) -> None:
    plan = Plan(tp=2, pp=2, counts=(1, 2), tied=True)
    model = make_model(plan)
    tensors: dict[str, Chunked] = {}
    for rank in range(4):
        chunk = rank_model(model, plan, rank % 2, rank // 2, 0, 0)
        own = chunk if impl == "local" else fused(chunk)
        tensors |= keys("", rank, 0, buckets(own.values(), count))
    args = {"transformer_impl": impl, "decoder_first_pipeline_num_layers": 1}
    check(from_buffers(tensors, lazy(model), args, Sizes(tp=2, pp=2, layers=3)), model)


@pytest.mark.parametrize(("vpp", "flag"), [(2, None), (1, "embedding"), (1, "loss")])
def test_stages_of_other_layouts(vpp: int, flag: str | None) -> None:
    counts = (1, 1, 1, 1) if vpp == 2 else (1, 2) if flag == "embedding" else (2, 1)
    plan = Plan(tp=2, pp=2, vpp=vpp, counts=counts)
    model = make_model(plan)
    tensors: dict[str, Chunked] = {}
    for rank in range(4):
        for v in range(vpp):
            chunk = fused(rank_model(model, plan, rank % 2, rank // 2, v, 0))
            tensors |= keys("", rank, v, buckets(chunk.values(), 1))
    args = TE | ({f"account_for_{flag}_in_pipeline_split": True} if flag else {})
    sizes = Sizes(tp=2, pp=2, vpp=vpp, layers=sum(counts))
    check(from_buffers(tensors, lazy(model), args, sizes), model)


def by_kind(chunk: Model) -> list[torch.Tensor]:
    """TEGroupedMLP: all fc1 of a layer, then all fc2."""
    return [t for _, t in sorted(chunk.items(), key=lambda x: (x[0][:17], "fc2" in x[0]))]


def stacked(chunk: Model) -> list[torch.Tensor]:
    """GroupedMLP: the transposed experts one after the other."""
    out = []
    for layer in dict.fromkeys(re.findall(r"layers\.\d+\.", " ".join(chunk))):
        for which in ("fc1", "fc2"):
            own = [t.T for n, t in chunk.items() if layer in n and which in n]
            out.append(torch.stack(own).contiguous())
    return out


@pytest.mark.parametrize("etp", [1, 2])
@pytest.mark.parametrize("style", ["sequential", "grouped", "legacy"])
def test_experts_have_buffers_of_their_own(style: str, etp: int) -> None:
    plan = Plan(tp=2, pp=2, ep=2, etp=etp, counts=(1, 2), experts=4)
    model = make_model(plan)
    tensors: dict[str, Chunked] = {}
    for rank in range(4):
        chunk = rank_model(model, plan, rank % 2, rank // 2, 0, 0)
        dense = fused({n: t for n, t in chunk.items() if ".experts." not in n})
        tensors |= keys("chained_0.", rank, 0, buckets(dense.values(), 1))
    for rank in range(etp * 2 * 2):
        t, e, p = rank % etp, rank // etp % 2, rank // etp // 2
        chunk = rank_model(model, plan, t, p, 0, e)
        experts = {n: x for n, x in chunk.items() if ".experts." in n}
        own = {"sequential": list(experts.values()), "grouped": by_kind(experts)}.get(style)
        flats = buckets(stacked(experts) if own is None else own, 1)
        tensors |= keys("chained_1.", rank, 0, flats)
    args = TE | {
        "moe_grouped_gemm": style != "sequential",
        "decoder_first_pipeline_num_layers": 1,
    }
    sizes = Sizes(tp=2, pp=2, ep=2, etp=etp, layers=3)
    check(from_buffers(tensors, lazy(model), args, sizes), model)


def test_what_does_not_fit_is_refused() -> None:
    plan = Plan(tp=1, counts=(2,))
    model = make_model(plan)
    good = keys("", 0, 0, buckets(fused(model).values(), 1))
    sizes = Sizes(layers=2)
    short = {k: t.slice([slice(0, t.shape[0] - 64)]) for k, t in good.items()}
    strange = {k.replace("gbuf_idx_0", "gbuf_idx_3"): t for k, t in good.items()}
    mixed = good | {k.replace("bfloat16", "float32"): t for k, t in good.items()}
    two = Plan(pp=2, counts=(1, 1))
    stage = rank_model(make_model(two), two, 0, 0, 0, 0)
    half = keys("", 0, 0, buckets(fused(stage).values(), 1))
    with pytest.raises(UnsupportedError, match="no master of"):
        from_buffers(half, lazy(model), TE, Sizes(pp=2, layers=2))
    for tensors in (short, strange, mixed):
        with pytest.raises(UnsupportedError):
            from_buffers(tensors, lazy(model), TE, sizes)
