"""Run files: what is written is read back; what cannot be is refused with a hint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mconv.errors import ConfigError
from mconv.trainer.optim import rate
from mconv.trainer.settings import RunConfig, load_config
from mconv.trainer.settings.degrees import resolve
from mconv.trainer.settings.model import ModelConfig
from mconv.trainer.settings.sections import (
    DataConfig,
    OptimConfig,
    SaveConfig,
    ScheduleConfig,
    TrainConfig,
)

from ..toys import dump_config


def config(folder: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        ),
        train=TrainConfig(steps=3, seq_len=16, batch=4, threads=1),
        optim=OptimConfig(lr=1e-3, eps=1e-12),
        data=DataConfig(tokens=folder / 'a "b" \\ c.npy', tokenizer=Path("/elsewhere")),
        save=SaveConfig(folder=folder / "run"),
    )


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(dump_config(config(tmp_path), tmp_path), encoding="utf-8")
    assert load_config(path) == config(tmp_path)
    assert 'folder = "run"' in path.read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps = 3", "step = 3", "unknown key 'step' .did you mean 'steps'"),
        ("steps = 3", "", "'steps' is missing"),
        ("steps = 3", "steps = 0", "at least 1, not 0"),
        ("steps = 3", 'steps = "3"', "steps must be of type int, not '3'"),
        ("steps = 3", "steps = true", "must be of type int"),
        ("[optim]", "[optimizer]", "unknown key 'optimizer' .did you mean 'optim'"),
        ("[model]", "[model", "cannot be read as TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "run.toml"
    text = dump_config(config(tmp_path), tmp_path)
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_batch_must_fit_the_ranks(tmp_path: Path) -> None:
    assert resolve(config(tmp_path), 2).rows == 2
    with pytest.raises(ConfigError, match="ranks=3 does not divide batch=4; use 1, 2, 4"):
        resolve(config(tmp_path), 3)


def test_schedule() -> None:
    plan = ScheduleConfig(warmup=4, floor=0.1)
    rates = [rate(step, 20, plan) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rate(12, 20, plan) == pytest.approx(0.55)
    assert rate(20, 20, plan) == pytest.approx(0.1)
    assert rate(0, 1, replace(plan, warmup=0)) == 1.0
