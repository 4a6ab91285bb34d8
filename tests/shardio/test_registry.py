"""Which checkpoint of a folder is opened: steps by number, one alone, never one of several."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from mconv.errors import FormatError, MconvError
from mconv.shardio import open_checkpoint
from safetensors.numpy import save_file


def model(folder: Path, value: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": np.full(3, value, np.float32)}, folder / "model.safetensors")
    return folder


def value(path: Path) -> float:
    return float(open_checkpoint(path).weights["w"].read()[0])


@pytest.mark.parametrize(
    "name", ["checkpoint-{}", "step_{}", "{}", "ckpt-{}", "epoch=1-step={}.ckpt", "iter_{:07d}"]
)
def test_the_highest_step_is_opened(tmp_path: Path, name: str) -> None:
    for step in (9, 20, 100):
        model(tmp_path / name.format(step), step)
    model(tmp_path / "best", 1)
    assert value(tmp_path) == 100


def test_one_alone_is_opened(tmp_path: Path) -> None:
    model(tmp_path / "model", 3)
    model(tmp_path / "optim", 4)
    (tmp_path / "logs").mkdir()
    (tmp_path / "link").symlink_to("model")
    assert value(tmp_path) == 3


def test_one_of_several_is_not_guessed(tmp_path: Path) -> None:
    model(tmp_path / "actor", 1)
    model(tmp_path / "critic", 2)
    with pytest.raises(FormatError, match=r"2 checkpoints .*: actor, critic; name one of them"):
        open_checkpoint(tmp_path)
    assert value(tmp_path / "critic") == 2


@pytest.mark.parametrize(
    "name",
    [
        "x.bin", "x.ckpt", "x.index", "x.gguf", "x.pt", "x.pdparams", "checkpoint", "latest",
        "latest_universal", "latest.txt", "latest_checkpointed_iteration.txt", ".metadata",
        "model.safetensors", "model.safetensors.index.json", "trainer_state.json", "config.json",
        "params.json", "optimizer.pt", "model_config.json", "_METADATA", "adapter_config.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", [False, True])
def test_nobody_waits_for_a_pipe(tmp_path: Path, name: str, beside: bool) -> None:
    folder = model(tmp_path / "run") if beside and name != "model.safetensors" else tmp_path / "run"
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    with contextlib.suppress(MconvError):
        assert open_checkpoint(folder).weights
