"""Impossible layouts are refused with the arithmetic; possible ones are resolved and planned."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from mconv.errors import ConfigError  # noqa: E402
from mconv.trainer.pipeline import split_layers, stage_indices  # noqa: E402
from mconv.trainer.planning.dryrun import plan_run  # noqa: E402
from mconv.trainer.settings import RunConfig  # noqa: E402
from mconv.trainer.settings.degrees import resolve  # noqa: E402
from mconv.trainer.settings.model import ModelConfig  # noqa: E402
from mconv.trainer.settings.sections import SCHEDULES  # noqa: E402

from ..toys import run_config  # noqa: E402


@pytest.mark.parametrize(
    ("model", "parallel", "train", "world", "said"),
    [
        ("dense", {"tp": 2, "pp": 2}, {}, 6, r"pp=2 \* tp=2 \* dp_shard=1 is 4, but there are 6"),
        ("dense", {"dp_shard": 3}, {}, 2, "start 3, or change a degree"),
        ("dense", {}, {"batch": 6}, 4, "ranks=4 does not divide batch=6; use 1, 2, 3, 6"),
        ("dense", {}, {"micro_batch": 3}, 2, "micro_batch=3 does not divide .*rows=4"),
        ("gqa", {"tp": 4}, {}, 4, "tp=4 does not divide num_key_value_heads=2; use 1, 2"),
        ("dense", {"sp": True}, {}, 1, "need parallel.tp > 1"),
        ("dense", {"tp": 2, "sp": True}, {"seq_len": 7}, 2, "tp=2 does not divide seq_len=7"),
        ("dense", {"cp": 2}, {"seq_len": 9}, 2, "cp=2 does not divide seq_len=9; use 1, 3, 9"),
        ("moe", {"ep": 3}, {"batch": 12}, 3, "ep=3 does not divide num_experts=4; use 1, 2, 4"),
        ("moe", {"ep": 4, "dp_shard": 2}, {}, 2, "ep=4 does not divide dp_shard=2"),
        ("dense", {"ep": 2}, {}, 2, "model.num_experts is 0"),
        ("dense", {"pp": 8}, {"batch": 32}, 8, r"8 \* 1 = 8 stages, .* only num_hidden_layers=4"),
        ("dense", {"pp": 4}, {"batch": 4}, 4, "2 micro-batches .* do not fill 4 pipeline stages"),
        ("dense", {"pp": 2}, {"batch": 8, "micro_batch": 0}, 2, "use train.micro_batch=4$"),
        ("dense", {"pp": 4}, {"batch": 2}, 4, r"use train.batch=4 \(or a .* train.micro_batch=1$"),
        ("dense", {"pp": 2, "microbatches": 1}, {}, 2, "use parallel.microbatches=2$"),
        ("dense", {"pp": 2, "microbatches": 3}, {}, 2, "microbatches=3 does not divide"),
        ("moe", {"ep": 2}, {"checkpointing": "selective"}, 2, "experts of other ranks"),
        (
            "dense",
            {"tp": 2},
            {"checkpointing": "selective", "compile": True},
            2,
            "use checkpointing 'full' or 'none'",
        ),
        (
            "dense",
            {"pp": 2, "schedule": "DualPipeV"},
            {"checkpointing": "selective"},
            2,
            "runs backward twice",
        ),
    ],
)
def test_impossible_layouts_are_refused(
    model: str, parallel: dict[str, Any], train: dict[str, Any], world: int, said: str
) -> None:
    config = run_config(model, {"micro_batch": 2, **train}, **parallel)
    with pytest.raises(ConfigError, match=said):
        resolve(config, world)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"schedule": "1F2B"}, "did you mean '1F1B'"),
        ({"zero": 4}, "none of 0, 1, 2, 3"),
        ({"tp": 0}, "at least 1"),
        ({"cpu_offload": True, "zero": 1}, "needs parallel.zero 2 or 3"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_config(**values)


def test_what_is_left_is_sharded() -> None:
    degrees = resolve(run_config("dense", {"batch": 64}, tp=2, pp=2, microbatches=4), 16)
    assert (degrees.dp_shard, degrees.rows, degrees.micro_batch) == (4, 16, 4)
    assert str(degrees) == "pp=2 dp_shard=4 tp=2"


@given(layers=st.integers(1, 40), stages=st.integers(1, 12), vocab=st.integers(8, 200_000))
def test_stages_share_all_layers(layers: int, stages: int, vocab: int) -> None:
    stages = min(stages, layers)
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    parts = split_layers(config, stages)
    assert [n for part in parts for n in part] == list(range(layers))
    assert all(len(part) for part in parts)
    assert len(parts) == stages


def test_a_large_vocabulary_weighs_on_the_last_stage() -> None:
    config = run_config("dense").model
    assert [len(p) for p in split_layers(config, 2)] == [2, 2]
    large = ModelConfig(**{**_values(config), "vocab_size": 300})
    assert [len(p) for p in split_layers(large, 2)] == [3, 1]


def _values(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__slots__}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_has_one_rank(schedule: str) -> None:
    config = run_config("dense", {"micro_batch": 1, "steps": 1}, pp=2, schedule=schedule)
    degrees = resolve(config, 2)
    stages = [s for rank in range(2) for s in stage_indices(rank, degrees, schedule)]
    assert sorted(stages) == list(range(2 * SCHEDULES[schedule]))


def config_of(model: str, **parallel: Any) -> RunConfig:
    return run_config(model, {"batch": 32, "micro_batch": 1, "dtype": "float32"}, **parallel)


def test_plans_count_what_ranks_have() -> None:
    alone = plan_run(config_of("tied"), 1)
    assert alone.parameters == alone.ranks[0].parameters
    assert alone.ranks[0].parameter_bytes == 4 * alone.parameters
    assert alone.ranks[0].optimizer_bytes == 8 * alone.parameters
    assert alone.ranks[0].gathered_bytes == 0
    assert alone.checkpoint_bytes == 12 * alone.parameters
    assert alone.tokens_per_step == 32 * 8

    ddp, zero1, zero3 = (plan_run(config_of("tied", zero=zero), 4) for zero in (0, 1, 3))
    assert ddp.ranks[0].total_bytes == alone.ranks[0].total_bytes
    assert zero1.ranks[0].parameter_bytes == alone.ranks[0].parameter_bytes
    assert zero1.ranks[0].optimizer_bytes < 0.3 * alone.ranks[0].optimizer_bytes
    assert zero3.ranks[0].parameter_bytes < 0.3 * alone.ranks[0].parameter_bytes
    assert zero3.ranks[0].gathered_bytes < alone.ranks[0].parameter_bytes
    for plan in (ddp, zero1, zero3):
        assert plan.parameters == alone.parameters
        assert plan.checkpoint_bytes == alone.checkpoint_bytes


def test_plans_of_pipelines_have_every_layer_once() -> None:
    plan = plan_run(config_of("tied", pp=2, tp=2, schedule="ZBVZeroBubble", zero=2), 8)
    assert plan.ranks[0].layers == ((0,), (3,))
    assert plan.ranks[1].layers == ((1,), (2,))
    assert plan.parameters == plan_run(config_of("tied"), 1).parameters


def test_plans_of_experts_have_each_once() -> None:
    plan = plan_run(config_of("moe", ep=4), 4)
    assert plan.parameters == plan_run(config_of("moe"), 1).parameters
    assert 4 * plan.ranks[0].parameters < 1.1 * plan.parameters
