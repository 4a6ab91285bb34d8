"""Learning rates, loss scaling, Muon, and the load balancing loss, each against its definition."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mconv.trainer.build import build_state  # noqa: E402
from mconv.trainer.loop import new_run, one_step  # noqa: E402
from mconv.trainer.mesh import build_meshes, process_group  # noqa: E402
from mconv.trainer.moe import MoE  # noqa: E402
from mconv.trainer.optim import rate  # noqa: E402
from mconv.trainer.settings import RunConfig  # noqa: E402
from mconv.trainer.settings.degrees import resolve  # noqa: E402
from mconv.trainer.settings.sections import ScheduleConfig  # noqa: E402
from mconv.trainer.state import LossScale  # noqa: E402

from .ranks import Ranks  # noqa: E402
from .toys import FULL_TP, ToyData, run_config, trained, world_size  # noqa: E402


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {10: 1.0, 55: 1.0, 99: 1.0}),
        ("linear", {10: 1.0, 55: 0.55, 100: 0.1}),
        ("cosine", {10: 1.0, 55: 0.55, 100: 0.1}),
        ("wsd", {10: 1.0, 79: 1.0, 80: 1.0, 85: 0.1 + 0.9 * (1 - sqrt(0.25)), 100: 0.1}),
    ],
)
def test_rates(kind: str, expected: dict[int, float]) -> None:
    config = ScheduleConfig(kind=kind, warmup=10, decay=20, floor=0.1)
    assert [rate(step, 100, config) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    for step, value in expected.items():
        assert rate(step, 100, config) == pytest.approx(value)


def test_wsd_decays_over_a_tenth() -> None:
    config = ScheduleConfig(kind="wsd", floor=0.0)
    assert rate(90, 100, config) == 1.0
    assert rate(91, 100, config) == pytest.approx(1 - sqrt(0.1))


def test_loss_scale_halves_and_doubles() -> None:
    scale = LossScale(1024.0)
    scale.update(False)
    assert scale.value == 512
    for _ in range(2000):
        scale.update(True)
    assert (scale.value, scale.good) == (1024, 0)


def overflown(rank: int, world: int, store: Path, config: RunConfig) -> list[Any]:
    """Two steps, the first with a scale that no float16 survives."""
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        before = {n: p.detach().clone() for n, p in run.state.all_parameters()}
        run.state.scale.value = 2.0**40
        one_step(run)
        same = all(bool((before[n] == p).all()) for n, p in run.state.all_parameters())
        assert run.state.scale.value == 2.0**39
        run.state.scale.value = 2.0**10
        return [same, one_step(run).grad_norm, run.state.scale.good]


def test_an_overflow_skips_the_step_on_all_ranks(ranks: Ranks) -> None:
    config = run_config("tied", {"dtype": "float32", "precision": "fp16"}, pp=2)
    for same, norm, good in ranks(overflown, 2, config):
        assert same
        assert np.isfinite(norm)
        assert good == 1


def muon_steps(rank: int, world: int, store: Path, config: RunConfig) -> list[str]:
    with process_group(rank, world, store):
        state = build_state(config, build_meshes(resolve(config, world), "cpu"))
        _, muon = state.optimizers
        assert isinstance(muon, torch.optim.Muon)
        mine = {id(p) for group in muon.param_groups for p in group["params"]}
        return sorted(n for n, slot in state.slots.items() if id(slot) in mine)


def test_muon_has_the_matrices_inside_layers(ranks: Ranks) -> None:
    config = run_config("moe")
    config = replace(config, optim=replace(config.optim, name="muon"))
    names = ranks(muon_steps, 1, config)[0]
    assert len(names) == 4 * 4
    assert {n.split(".", 3)[3] for n in names} == {
        f"self_attn.{p}_proj.weight" for p in ("q", "k", "v", "o")
    }


@pytest.mark.parametrize("layout", [{}, {"zero": 1}, FULL_TP, {"pp": 2}], ids=str)
def test_muon_agrees_to_its_bfloat16(ranks: Ranks, layout: dict[str, Any]) -> None:
    """torch orthogonalizes in bfloat16, so layouts agree to its rounding only."""

    def with_muon(config: RunConfig) -> RunConfig:
        return replace(config, optim=replace(config.optim, name="muon"))

    expected = ranks(trained, 1, with_muon(run_config("dense")))[0]
    for one in ranks(trained, world_size(layout), with_muon(run_config("dense", **layout))):
        np.testing.assert_allclose(one, expected, rtol=1e-3)


def balance(rank: int, world: int, store: Path) -> tuple[float, float, float]:
    """The gradient of a router's weight along a direction: by autograd, and by differences."""
    config = run_config("moe").model
    torch.manual_seed(0)
    layer = MoE(config).double()
    x = torch.randn(3, 5, config.hidden_size, dtype=torch.float64)
    direction = torch.randn_like(layer.gate.weight)

    def loss() -> Any:
        """Switch Transformer's loss of each row, summed: experts * sum(share * probability)."""
        total = torch.zeros((), dtype=torch.float64)
        for row in x:
            odds = torch.softmax(row @ layer.gate.weight.T, -1)
            chosen = odds.topk(layer.top, -1).indices
            share = torch.nn.functional.one_hot(chosen, config.num_experts).double().mean((0, 1))
            total = total + config.num_experts * (share * odds.mean(0)).sum()
        return total

    layer.balance = 0.5
    torch.autograd.backward(layer(x).sum() * 0)
    by_autograd = float((layer.gate.weight.grad * direction).sum())
    with torch.no_grad():
        step = 1e-6
        layer.gate.weight += step * direction
        above = loss()
        layer.gate.weight -= 2 * step * direction
        below = loss()
    return by_autograd, float(0.5 * (above - below) / (2 * step)), float(above)


def test_load_balancing_loss(ranks: Ranks) -> None:
    by_autograd, by_differences, value = ranks(balance, 1)[0]
    assert by_autograd == pytest.approx(by_differences, rel=1e-6)
    assert value >= 3  # one per row when all experts are chosen alike
