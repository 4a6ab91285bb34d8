"""The traps of distributed training that give wrong models silently, one named test each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mconv.errors import ConfigError  # noqa: E402
from mconv.trainer.build import build_state  # noqa: E402
from mconv.trainer.loop import new_run, one_step  # noqa: E402
from mconv.trainer.mesh import DP, FSDP, build_meshes, process_group  # noqa: E402
from mconv.trainer.optim import (  # noqa: E402
    settle,
    shards,
    total_norm,
)
from mconv.trainer.settings import RunConfig  # noqa: E402
from mconv.trainer.settings.degrees import resolve  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor  # noqa: E402

from .ranks import Ranks  # noqa: E402
from .toys import FULL_TP, Check, ToyData, plain_model, run_config, world_size  # noqa: E402

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"zero": 1},
    FULL_TP,
    {"dp_shard": 2, **FULL_TP},
    {"pp": 2, "schedule": "ZBVZeroBubble"},
    {"dp_replicate": 2, "dp_shard": 2},
]


def whole(parameter: Any) -> Any:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def initial(rank: int, world: int, store: Path, config: RunConfig) -> dict[str, Any]:
    """Whole initial weights by name, and whether a tied head is the embedding."""
    with process_group(rank, world, store):
        state = build_state(config, build_meshes(resolve(config, world), "cpu"))
        out = {n: whole(p.detach()).numpy() for n, p in state.all_parameters()}
        for part in state.parts:
            if part.tied:
                assert part.lm_head.weight is part.model.embed_tokens.weight
                assert "lm_head.weight" not in out
    return out


def plain(rank: int, world: int, store: Path, config: RunConfig) -> dict[str, Any]:
    return {n: p.detach().numpy() for n, p in plain_model(config).named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_initial_weights_do_not_depend_on_the_layout(ranks: Ranks, layout: dict[str, Any]) -> None:
    """Drawn into shards, CPU ranks would all get the same numbers; and heads stay tied."""
    for model in ("tied", "moe"):
        config = run_config(model, **layout)
        if layout == {"zero": 1} and model == "moe":
            config = run_config(model, zero=1, ep=2)
        expected = ranks(plain, 1, config)[0]
        got: dict[str, Any] = {}
        for one in ranks(initial, world_size(layout), config):
            got |= one
        copy = got.pop("lm_head.weight", None) if model == "tied" else None
        assert set(got) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(got[name], values, err_msg=name)
        if copy is not None:
            np.testing.assert_array_equal(copy, expected["model.embed_tokens.weight"])


def mean_of_means(rank: int, world: int, store: Path, config: RunConfig) -> tuple[float, float]:
    """The loss of the first step as it is, and as the mean of the ranks' means."""
    import torch.distributed as dist

    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        batch = run.data.batch(0, config.train.batch, *place(run))
        logits = plain_model(config)(batch.inputs)
        mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        mean = mean.detach()
        dist.all_reduce(mean)
        return one_step(run).loss, mean.item() / world


def place(run: Any) -> tuple[int, int]:
    return run.state.meshes.rank(*DP), run.state.meshes.size(*DP)


def test_the_loss_is_no_mean_of_means(ranks: Ranks) -> None:
    config = run_config()
    ours, wrong = ranks(mean_of_means, 2, config)[0]
    model_loss = ranks(mean_of_means, 1, replace(config, parallel=config.parallel))[0][1]
    assert ours == pytest.approx(model_loss, rel=1e-12)
    assert abs(wrong / model_loss - 1) > 1e-4


def test_sums_of_three_ranks_need_no_premultiplied_reduction(check: Check) -> None:
    """Gloo lacks the reduction that a divide factor asks for; and 3 divides no power of two."""
    check({}, "tied", world=3, batch=6)
    check({"zero": 1}, "gqa", world=3, batch=6)


def forced(rank: int, world: int, store: Path, config: RunConfig) -> int:
    with process_group(rank, world, store):
        state = build_state(config, build_meshes(resolve(config, world), "cpu"))
        units = [m for m in state.parts[0].modules() if isinstance(m, FSDPModule)]
        for unit in units:
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                assert group.gradient_divide_factor == 1.0
                assert group.force_sum_reduction_for_comms
        return len(units)


def test_every_unit_sums_gradients(ranks: Ranks) -> None:
    assert ranks(forced, 2, run_config("moe", ep=2))[0] == 4 + 4 + 1  # experts, layers, rest
    assert ranks(forced, 2, run_config(zero=0))[0] == 4 + 1


def mixed_norm(rank: int, world: int, store: Path, seed: int) -> tuple[float, float]:
    """The norm of plain and ``DTensor`` gradients on two meshes, ours and by hand."""
    with process_group(rank, world, store):
        config = run_config(dp_shard=2, tp=2)
        meshes = build_meshes(resolve(config, world), "cpu")
        draw = torch.Generator().manual_seed(seed)
        values = [torch.randn(6, 5, generator=draw, dtype=torch.float64) for _ in range(5)]
        dp, tp = meshes.sub(*FSDP), meshes.sub("tp")
        both = meshes.world["dp_mod", "tp"]
        grads = [
            values[0],
            distribute_tensor(values[1], dp, [Shard(0)]),
            distribute_tensor(values[2], tp, [Replicate()]),
            distribute_tensor(values[3], both, [Shard(0), Shard(1)]),
            distribute_tensor(values[4], both, [Replicate(), Shard(0)]),
        ]
        like = torch.zeros((), dtype=torch.float64)
        expected = torch.stack([v.norm() for v in values]).norm()
        return float(total_norm(grads, None, like)), float(expected)


def test_plain_and_distributed_gradients_have_one_norm(ranks: Ranks) -> None:
    """``clip_grad_norm_`` refuses the mixture; each must count once whatever mesh it is on."""
    for ours, expected in ranks(mixed_norm, 4, 3):
        assert ours == pytest.approx(expected, rel=1e-14)


def partial_grad(rank: int, world: int, store: Path) -> list[list[float]]:
    from torch.distributed.tensor import Partial

    with process_group(rank, world, store):
        meshes = build_meshes(resolve(run_config(tp=2), world), "cpu")
        mesh = meshes.sub("tp")
        weight = torch.nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
        weight.grad = DTensor.from_local(torch.tensor([1.0, float(rank)]), mesh, [Partial()])
        return [g.to_local().tolist() for g in settle([weight])]


def test_parts_of_sums_are_summed_before_clipping(ranks: Ranks) -> None:
    assert ranks(partial_grad, 2) == [[[2.0, 1.0]]] * 2


def test_key_value_heads_must_divide_by_tp() -> None:
    """torch fails late, in a view; we name the valid degrees before anything exists."""
    with pytest.raises(ConfigError, match="tp=4 does not divide num_key_value_heads=2; use 1, 2"):
        resolve(run_config("gqa", tp=4), 4)


def counted(rank: int, world: int, store: Path, config: RunConfig) -> list[str]:
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        one_step(run)
        copy = run.state.tied_copy()
        embedding = run.state.parameters().get("model.embed_tokens.weight")
        weights = [None if p is None else whole(p.detach()).numpy() for p in (copy, embedding)]
        return [*weights, sorted(run.state.parameters())]


def test_a_tied_copy_counts_once_in_the_norm_and_stays_equal(
    ranks: Ranks,
    check: Check,
) -> None:
    """Under a pipeline embedding and head are two parameters: same gradient, one norm."""
    check({"pp": 2}, "tied")
    first, last = ranks(counted, 2, run_config("tied", pp=2))
    assert first[0] is None
    assert last[1] is None
    np.testing.assert_array_equal(first[1], last[0])
    assert "lm_head.weight" not in first[2] + last[2]


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_split_backward_never_meets_released_weights(schedule: str) -> None:
    """torch would drop the gradients of weights that ZeRO 3 released between the two halves."""
    train = {"micro_batch": 1}
    with pytest.raises(ConfigError, match=r"use parallel\.zero=2"):
        resolve(run_config("dense", train, dp_shard=2, pp=2, schedule=schedule), 4)
    resolve(run_config("dense", train, dp_shard=2, pp=2, zero=2, schedule=schedule), 4)


def zero1_shards(rank: int, world: int, store: Path, config: RunConfig) -> dict[str, Any]:
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        one_step(run)
        states = run.state.optimizer_states()
        for name, parameter in run.state.parameters().items():
            moments = states[name]["exp_avg"]
            assert tuple(moments.shape) == tuple(parameter.shape)
        again = shards(run.state.parameters(), run.state.meshes.replicating())
        return {
            name: (p.numel(), run.state.slots[name].to_local().numel(), again[name].placements)
            for name, p in run.state.parameters().items()
        }


def test_zero1_halves_the_optimizer(ranks: Ranks) -> None:
    for one in ranks(zero1_shards, 2, run_config("tied", zero=1)):
        whole_size = sum(size for size, _, _ in one.values())
        mine = sum(size for _, size, _ in one.values())
        assert abs(mine / whole_size - 0.5) < 0.02
        assert all(p == (Shard(0),) for _, _, p in one.values())
