"""Colossal-AI booster checkpoints: the fixture with its optimizer, broken folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mconv.errors import FormatError
from mconv.shardio.registry import open_checkpoint

from .torch_cases import assert_equals_truth, cut, load_truth, swap, writable_copy


@pytest.fixture
def copy(fixtures_dir: Path, tmp_path: Path) -> Path:
    return writable_copy(fixtures_dir / "colossalai/colossalai_pp2/ckpt", tmp_path / "ckpt")


def test_equals_truth(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "colossalai" / "colossalai_pp2"
    checkpoint = open_checkpoint(folder / "ckpt")
    assert (checkpoint.format, checkpoint.layout.pp) == ("colossalai", 2)
    assert checkpoint.step == 3
    assert checkpoint.scalars["param_groups"][0]["betas"] == [0.9, 0.95]
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))


@pytest.mark.parametrize(
    "place", ["modeling", "optimizer", "modeling/pytorch_model.bin.index.json"]
)
def test_places_that_mean_it(copy: Path, place: str) -> None:
    assert open_checkpoint(copy / place).format == "colossalai"


def test_missing_model_file(copy: Path) -> None:
    (copy / "modeling" / "pytorch_model-stage-00002-shard-00002.bin").unlink()
    with pytest.raises(FormatError, match="stage-00002-shard-00002"):
        open_checkpoint(copy)


def test_missing_optimizer_file(copy: Path) -> None:
    (copy / "optimizer" / "pytorch_optim-00004.bin").unlink()
    with pytest.raises(FormatError, match="pytorch_optim-00004"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "names",
    [
        ("modeling/pytorch_model-stage-00001-shard-00001.bin",
         "modeling/pytorch_model-stage-00002-shard-00001.bin"),
        ("optimizer/pytorch_optim-00001.bin", "optimizer/pytorch_optim-00004.bin"),
    ],
)  # fmt: skip
def test_swapped(copy: Path, names: tuple[str, str]) -> None:
    swap(copy / names[0], copy / names[1])
    with pytest.raises(FormatError, match="swapped"):
        open_checkpoint(copy)


def test_truncated(copy: Path) -> None:
    cut(copy / "optimizer" / "pytorch_optim-00004.bin")
    with pytest.raises(FormatError):
        open_checkpoint(copy)


def test_unfinished(copy: Path) -> None:
    (copy / "modeling" / "pytorch_model.bin.index.json").unlink()
    (copy / "modeling" / "tmp_index_files").mkdir()
    with pytest.raises(FormatError, match="did not finish"):
        open_checkpoint(copy)


def test_model_alone(copy: Path) -> None:
    shutil.rmtree(copy / "optimizer")
    checkpoint = open_checkpoint(copy)
    assert not checkpoint.optimizer
    assert len(checkpoint.weights) == 21
