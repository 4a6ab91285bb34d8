"""Parameter groups, steps and masters from what different sources tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.errors import ConfigError, LayoutError
from mconv.shardio import Checkpoint, Layout, from_array
from mconv.shardio.dtypes import BFLOAT16, FLOAT32
from mconv.shardio.training_file import FILE, read_training_file
from mconv.shardio.training_state import full_precision, optimizer_step, training_state

SHAPES = {"w": (2, 3), "norm.weight": (3,), "w.bias": (2,), "rope.inv_freq": (4,)}


def checkpoint(scalars: dict[str, Any], states: bool = True, **options: Any) -> Checkpoint:
    weights = {n: from_array(np.ones(s, BFLOAT16)) for n, s in SHAPES.items()}
    moments = {n: from_array(np.ones(SHAPES[n], np.float32)) for n in list(SHAPES)[:3]}
    optimizer = {"exp_avg": moments, "exp_avg_sq": moments} if states else {}
    return Checkpoint(
        path=Path("memory"), format="x", weights=weights, optimizer=optimizer, scalars=scalars,
        **options,
    )  # fmt: skip


def test_named_groups() -> None:
    groups = [{"lr": 0.1, "params": ["w"]}, {"lr": 0.2, "params": ["norm.weight", "w.bias"]}]
    found = training_state(checkpoint({"param_groups": groups}))
    assert [g.names for g in found.groups] == [("w",), ("norm.weight", "w.bias")]
    assert [g.settings["lr"] for g in found.groups] == [0.1, 0.2]
    assert found.groups[0].settings["betas"] == (0.9, 0.999)  # what a source leaves out
    assert found.buffers == ("rope.inv_freq",)
    assert not found.warnings


def test_megatrons_groups_go_by_shape() -> None:
    groups = [{"weight_decay": 0.1}, {"weight_decay": 0.0}]
    found = training_state(checkpoint({"param_groups": groups}))
    assert [g.names for g in found.groups] == [("w",), ("norm.weight", "w.bias")]


def test_nameless_groups_become_one() -> None:
    groups = [{"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.2, "weight_decay": 0.1}]
    found = training_state(checkpoint({"param_groups": groups}))
    assert len(found.groups) == 1
    assert found.groups[0].settings["lr"] == 0.1
    assert "2 parameter groups" in found.warnings[0]


def test_weights_outside_all_groups_are_said() -> None:
    found = training_state(checkpoint({"param_groups": [{"params": ["w"]}]}))
    assert found.groups[0].names == ("w", "norm.weight", "w.bias")
    assert "2 weights" in found.warnings[0]


def test_nothing_known() -> None:
    found = training_state(checkpoint({}))
    assert found.groups[0].settings["lr"] == 1e-3
    assert "hyper-parameters" in found.warnings[0]
    assert not training_state(checkpoint({}, states=False)).warnings


def test_masters_are_the_weights_where_there_are_none() -> None:
    ckpt = checkpoint({})
    found = training_state(ckpt)
    assert found.masters["w"].dtype == FLOAT32
    assert full_precision(ckpt, Layout("dcp"))["w"].dtype == BFLOAT16


@pytest.mark.parametrize(
    ("scalars", "step", "expected"),
    [
        ({"optimizer_steps": [7, None]}, 9, 7),
        ({"param_groups": [{"step": 4.0}]}, 9, 4),
        ({}, 9, 9),
        ({}, None, 0),
        ({"optimizer_steps": 3, "param_groups": "x"}, 9, 9),
        ({"optimizer_steps": [float("inf"), float("nan"), -1]}, 9, 9),
    ],
)
def test_steps(scalars: dict[str, Any], step: int | None, expected: int) -> None:
    assert optimizer_step(checkpoint(scalars, step=step)) == expected


def test_layouts_from_text() -> None:
    layout = Layout.parse("megatron:tp=2,pp=4,pp_layers=6+7+7+6,make_vocab_divisible_by=128")
    assert (layout.tp, layout.pp, layout.pp_layers) == (2, 4, (6, 7, 7, 6))
    assert Layout.parse("deepspeed:zero=3,dp=4") == Layout("deepspeed", dp=4, zero_stage=3)
    assert Layout.parse("hf") == Layout("hf")
    assert Layout.parse("hf:dtype=bf16").dtype == "bf16"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("dcp:tpp=2", ConfigError),
        ("dcp:tp", ConfigError),
        ("dcp:tp=two", ConfigError),
        ("dcp:tp=0", LayoutError),
        ("deepspeed:zero=4", LayoutError),
    ],
)
def test_bad_texts(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        Layout.parse(text)


def test_a_training_file_that_lies_is_taken_as_it_is(tmp_path: Path) -> None:
    assert read_training_file(tmp_path) == (None, {}, {})
    for text, expected in (
        ("[1]", (None, {}, {})),
        ('{"step": -3, "scalars": [1]}', (None, {}, {})),
        ('{"step": 3, "scalars": {"a": 1}, "training_dtype": "bfloat16", "other": 1}',
         (3, {"a": 1}, {"training_dtype": "bfloat16"})),
    ):  # fmt: skip
        (tmp_path / FILE).write_text(text)
        assert read_training_file(tmp_path) == expected
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ConfigError, match="JSON"):
        read_training_file(tmp_path)
