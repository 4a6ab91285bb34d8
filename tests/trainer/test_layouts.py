"""Every parallel layout trains exactly as the plain loop: loss and gradient norm of every step.

In float64 over gloo, so that nothing but the order of summation differs: 1e-12 is far below what
any wrong factor, mask, shard or missed gradient would do. Labels are masked unevenly, and gradients
are accumulated over micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mconv.trainer.loop import new_run, one_step  # noqa: E402
from mconv.trainer.mesh import DP, build_meshes, process_group  # noqa: E402
from mconv.trainer.settings import RunConfig  # noqa: E402
from mconv.trainer.settings.degrees import resolve  # noqa: E402

from .ranks import Ranks  # noqa: E402
from .toys import FULL_TP, Check, ToyData, run_config, world_size  # noqa: E402

SCHEDULES = ("GPipe", "Interleaved1F1B", "LoopedBFS")
SPLIT = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2 zero3": {},
    "dp2 zero2": {"zero": 2},
    "dp2 zero1": {"zero": 1},
    "ddp2": {"zero": 0},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "offload": {"cpu_offload": True},
    "tp2": {"tp": 2},
    "tp2 sp loss": FULL_TP,
    "cp2": {"cp": 2},
    "ep2": {"ep": 2},
    "pp2": {"pp": 2},
    **{f"pp2 {name}": {"pp": 2, "schedule": name} for name in (*SCHEDULES, *SPLIT)},
    **{f"dp2 pp2 {n}": {"dp_shard": 2, "zero": 2, "pp": 2, "schedule": n} for n in SPLIT},
    "dp2 tp2": {"dp_shard": 2, **FULL_TP},
    "dp2 pp2": {"dp_shard": 2, "pp": 2},
    "tp2 pp2": {"pp": 2, **FULL_TP},
    "tp2 pp2 ZBVZeroBubble": {"pp": 2, **FULL_TP, "schedule": "ZBVZeroBubble"},
    "zero1 tp2": {"dp_shard": 2, "zero": 1, **FULL_TP},
    "ddp2 pp2": {"dp_shard": 2, "zero": 0, "pp": 2},
    "cp2 tp2": {"cp": 2, **FULL_TP},
    "cp2 pp2": {"cp": 2, "pp": 2},
    "ep2 tp2": {"dp_shard": 2, "ep": 2, **FULL_TP},
    "ep2 pp2": {"dp_shard": 2, "ep": 2, "pp": 2},
    "dp4 ep2": {"dp_shard": 4, "ep": 2},
    "hsdp ep2": {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    "zero1 dp4 ep2": {"zero": 1, "dp_shard": 4, "ep": 2},
    "dp2 tp2 pp2": {"dp_shard": 2, "pp": 2, **FULL_TP},
}
CASES = [
    ("dp2 zero3", "dense"),
    ("dp2 zero3", "tied"),
    ("dp2 zero2", "moe"),
    ("dp2 zero1", "gqa"),
    ("ddp2", "tied"),
    ("hsdp", "gqa"),
    ("offload", "tied"),
    ("tp2", "dense"),
    ("tp2", "moe"),
    ("tp2 sp loss", "tied"),
    ("tp2 sp loss", "gqa"),
    ("tp2 sp loss", "gemma"),
    ("cp2", "gqa"),
    ("cp2", "mixtral"),
    ("ep2", "moe"),
    ("pp2", "dense"),
    ("pp2", "tied"),
    ("pp2 GPipe", "moe"),
    ("pp2 Interleaved1F1B", "tied"),
    ("pp2 LoopedBFS", "gqa"),
    ("pp2 InterleavedZeroBubble", "moe"),
    ("pp2 ZBVZeroBubble", "tied"),
    ("pp2 DualPipeV", "gqa"),
    ("dp2 pp2 InterleavedZeroBubble", "dense"),
    ("dp2 pp2 ZBVZeroBubble", "moe"),
    ("dp2 pp2 DualPipeV", "tied"),
    ("dp2 tp2", "tied"),
    ("dp2 tp2", "moe"),
    ("dp2 pp2", "tied"),
    ("tp2 pp2", "gqa"),
    ("tp2 pp2 ZBVZeroBubble", "moe"),
    ("zero1 tp2", "gqa"),
    ("ddp2 pp2", "tied"),
    ("cp2 tp2", "dense"),
    ("cp2 pp2", "tied"),
    ("ep2 tp2", "mixtral"),
    ("ep2 pp2", "moe"),
    ("dp4 ep2", "moe"),
    ("hsdp ep2", "moe"),
    ("zero1 dp4 ep2", "moe"),
    ("dp2 tp2 pp2", "tied"),
]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_layout_equals_the_plain_loop(check: Check, layout: str, model: str) -> None:
    smaller = {"micro_batch": 1} if layout.startswith("dp2 pp2 ") else {}
    check(LAYOUTS[layout], model, **smaller)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_one_process_equals_the_plain_loop(check: Check, model: str) -> None:
    check({}, model, world=1)


@pytest.mark.parametrize("layout", ["dp2 zero3", "tp2 sp loss", "cp2", "pp2", "cp2 pp2"])
def test_packed_documents_do_not_see_each_other(check: Check, layout: str) -> None:
    check(LAYOUTS[layout], "gqa", packed=True)


@pytest.mark.parametrize(
    ("layout", "model", "kind"),
    [
        ("dp2 zero3", "tied", "full"),
        ("dp2 zero3", "moe", "selective"),
        ("tp2 sp loss", "tied", "selective"),
        ("pp2 ZBVZeroBubble", "moe", "full"),
        ("ep2", "moe", "full"),
    ],
)
def test_recomputation_changes_nothing(check: Check, layout: str, model: str, kind: str) -> None:
    check(LAYOUTS[layout], model, checkpointing=kind)


@pytest.mark.parametrize(
    ("layout", "model"), [("dp2 zero3", "tied"), ("tp2 sp loss", "gqa"), ("pp2", "moe")]
)
def test_float32_agrees_to_rounding(check: Check, layout: str, model: str) -> None:
    check(LAYOUTS[layout], model, tolerance=5e-6, dtype="float32")


@pytest.mark.parametrize(
    ("layout", "model", "precision"),
    [
        ("one", "tied", "bf16"),
        ("dp2 zero3", "moe", "bf16"),
        ("dp2 zero1", "tied", "bf16"),
        ("offload", "tied", "bf16"),
        ("tp2 sp loss", "gqa", "bf16"),
        ("ep2", "moe", "bf16"),
        ("one", "tied", "fp16"),
        ("dp2 zero3", "moe", "fp16"),
        ("tp2 pp2", "tied", "fp16"),
    ],
)
def test_mixed_precision_is_near(check: Check, layout: str, model: str, precision: str) -> None:
    """bf16 has 8 bits: the norm of few, small gradients is within some percent."""
    check(
        LAYOUTS.get(layout, {}),
        model,
        tolerance={"bf16": 3e-2, "fp16": 4e-3}[precision],
        world=1 if layout == "one" else 0,
        like={"precision": "full"},
        dtype="float32",
        precision=precision,
    )


def test_bfloat16_parameters(check: Check) -> None:
    check({}, "tied", tolerance=3e-2, like={"dtype": "float32"}, dtype="bfloat16")


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("dp2 zero3", "tied"),
        ("tp2 sp loss", "gqa"),
        ("cp2", "moe"),
        ("ep2", "moe"),
        ("pp2", "tied"),
        ("pp2 ZBVZeroBubble", "gqa"),
        ("dp2 tp2 pp2", "tied"),
    ],
)
def test_evaluation_sees_what_training_sees(ranks: Ranks, layout: str, model: str) -> None:
    """Between steps, without leaving gradients, on all ranks alike."""
    config = run_config(model, **LAYOUTS[layout])
    for pairs in ranks(evaluated, world_size(LAYOUTS[layout]), config):
        for evaluated_loss, trained_loss in pairs:
            assert evaluated_loss == pytest.approx(trained_loss, rel=1e-12)


def evaluated(rank: int, world: int, store: Path, config: RunConfig) -> list[tuple[float, float]]:
    with process_group(rank, world, store):
        meshes = build_meshes(resolve(config, world), "cpu")
        run = new_run(config, meshes, ToyData(config))
        pairs = []
        for step in range(config.train.steps):
            batch = run.data.batch(step, config.train.batch, meshes.rank(*DP), meshes.size(*DP))
            loss, tokens = run.engine.evaluate(batch)
            assert tokens > 0
            assert all(p.grad is None for _, p in run.state.all_parameters())
            pairs.append((float(loss), one_step(run).loss))
    return pairs
