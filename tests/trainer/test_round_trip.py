"""Every kind of run is resumed as it was: LoRA, Muon, float16, bfloat16, HSDP; via GGUF too.

``test_resume.py`` has the layouts and other frameworks' formats.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import mconv  # noqa: E402
from mconv.convert.to_gguf import to_gguf  # noqa: E402
from mconv.shardio import Layout, open_checkpoint  # noqa: E402
from mconv.trainer.checkpoint import step_folder  # noqa: E402
from mconv.trainer.delivery.demo import documents  # noqa: E402
from mconv.trainer.loop import new_run, one_step  # noqa: E402
from mconv.trainer.mesh import build_meshes, process_group  # noqa: E402
from mconv.trainer.resume import CheckpointHook  # noqa: E402
from mconv.trainer.settings import RunConfig  # noqa: E402
from mconv.trainer.settings.degrees import resolve  # noqa: E402
from mconv.trainer.settings.sections import LoraConfig, ParallelConfig  # noqa: E402
from mconv.trainer.shards import pieces_of  # noqa: E402
from mconv.trainer.state import LossScale  # noqa: E402
from mconv.trainer.text.train_tokenizer import train_tokenizer  # noqa: E402

from .ranks import Ranks  # noqa: E402
from .test_resume import copied_by, ran, settings, tensors  # noqa: E402
from .toys import ToyData  # noqa: E402

Told = tuple[list[float], tuple[float, int]]
_SCALE = (1024.0, 7)  # not what a run starts with

#: (model, settings, layout that saves, ranks, layout that reads and saves again, ranks)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, dict[str, Any], int]] = {
    "lora": ("gqa", {"lora": True}, {"pp": 2}, 2, {"tp": 2}, 2),
    "muon": ("gqa", {"optim": {"name": "muon"}}, {}, 2, {"pp": 2}, 2),
    "fp16": ("tied", {"train": {"dtype": "float32", "precision": "fp16"}}, {"zero": 1}, 2, {}, 1),
    "bfloat16": ("gqa", {"train": {"dtype": "bfloat16"}}, {}, 2, {"tp": 2}, 2),
    "hsdp": ("moe", {}, {"dp_replicate": 2, "dp_shard": 2}, 4, {"zero": 1}, 2),
}


def configured(
    folder: Path, model: str, more: dict[str, Any], layout: dict[str, Any], **save: Any
) -> RunConfig:
    config = settings(folder, model, layout, **save)
    train = replace(config.train, **more.get("train", {}))
    optim = replace(config.optim, **more.get("optim", {}))
    lora = LoraConfig(rank=2, alpha=8.0, dropout=0.25) if "lora" in more else config.lora
    return replace(config, train=train, optim=optim, lora=lora)


def straight(rank: int, world: int, store: Path, config: RunConfig) -> Told:
    """Train four steps, saving in the middle."""
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        if config.train.precision == "fp16":
            run.state.scale = LossScale(*_SCALE)
        hook = CheckpointHook()
        hook.start(run)
        losses = []
        for step in range(4):
            losses.append(one_step(run).loss)
            if step == 1:
                hook.save(run)
        hook.stop(run)
    return losses, (run.state.scale.value, run.state.scale.good)


def resumed(rank: int, world: int, store: Path, config: RunConfig) -> Told:
    """Train the last two of four steps."""
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        hook = CheckpointHook()
        hook.start(run)
        losses = [one_step(run).loss for _ in range(2)]
        hook.stop(run)
    return losses, (run.state.scale.value, run.state.scale.good)


@pytest.mark.parametrize("case", CASES)
def test_goes_on_bitwise(ranks: Ranks, tmp_path: Path, case: str) -> None:
    model, more, layout, world, other, others = CASES[case]
    whole = configured(tmp_path / "whole", model, more, layout, resume="none")
    losses, scale = ranks(straight, world, whole)[0]
    middle, end = (step_folder(tmp_path / "whole", step) for step in (2, 4))
    parted = configured(tmp_path / "parted", model, more, layout, resume=str(middle))
    again, scale_again = ranks(resumed, world, parted)[0]
    assert again == losses[2:]
    assert scale_again == scale
    assert case != "fp16" or scale == (_SCALE[0], _SCALE[1] + 4)
    same(tensors(end), tensors(step_folder(tmp_path / "parted", 4)))
    # another layout reads and writes the very same state
    moved = configured(tmp_path / "moved", model, more, other, resume=str(middle))
    _, folder = ranks(copied_by, others, moved)[0]
    same(tensors(middle), tensors(Path(folder)))
    scales = [_scale_of(p) for p in (middle, Path(folder))]
    assert scales[0] == scales[1]


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    assert any(".lora_" in n or n.startswith(("exp_avg", "momentum_buffer")) for n in a)
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert value.tobytes() == b[name].tobytes(), name


def _scale_of(folder: Path) -> Any:
    from mconv.trainer.training_state import read_own

    return read_own(folder)["loss_scale"]


def test_what_a_kind_of_run_saves(ranks: Ranks, tmp_path: Path) -> None:
    """LoRA: states of the factors alone. Muon: momentum of matrices, moments of the rest."""
    lora = configured(tmp_path / "lora", "dense", {"lora": True}, {})
    found = open_checkpoint(ranks(ran, 2, lora, 0, 1)[0][1])
    assert all(".lora_" in n for n in found.optimizer["exp_avg"])
    assert len(found.optimizer["exp_avg"]) == 4 * 4 * 2
    muon = configured(tmp_path / "muon", "tied", {"optim": {"name": "muon"}}, {})
    found = open_checkpoint(ranks(ran, 2, muon, 0, 1)[0][1])
    momentum, moments = set(found.optimizer["momentum_buffer"]), set(found.optimizer["exp_avg"])
    assert momentum | moments == set(found.weights)
    assert not momentum & moments
    assert "lm_head.weight" not in found.weights  # tied: written once
    assert "model.layers.0.self_attn.q_proj.weight" in momentum


def weights_of(rank: int, world: int, store: Path, config: RunConfig) -> dict[str, Any]:
    """This rank's pieces of the initial weights."""
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        pieces = [
            piece
            for name, p in run.state.parameters().items()
            for piece in pieces_of(name, p, config.model)
        ]
    return {p.name: (p.offsets, p.data.float().numpy()) for p in pieces}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(documents(), folder, 320)
    return folder


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_weights_come_back_from_gguf(
    ranks: Ranks, tmp_path: Path, tokenizer: Path, dtype: str, kind: str
) -> None:
    """Exactly, into another layout."""
    config = configured(tmp_path / "run", "llama", {"train": {"dtype": dtype}}, {})
    config = replace(
        config,
        model=replace(config.model, vocab_size=320, num_key_value_heads=2),
        data=replace(config.data, tokenizer=tokenizer),
    )
    _, folder = ranks(ran, 2, config, 0, 1)[0]
    to_gguf(folder, tmp_path / "model.gguf", kind)
    model = replace(config.model, init_from=tmp_path / "model.gguf")
    again = replace(config, model=model, parallel=ParallelConfig(tp=2))
    expected = {n: t.read().astype(np.float32) for n, t in open_checkpoint(folder).weights.items()}
    seen = set()
    for pieces in ranks(weights_of, 2, again):
        for name, (starts, value) in pieces.items():
            region = tuple(slice(a, a + n) for a, n in zip(starts, value.shape, strict=True))
            assert np.array_equal(value, expected[name][region]), name
            seen.add(name)
    assert seen == set(expected)


def test_rounded_masters_are_told(ranks: Ranks, tmp_path: Path) -> None:
    config = configured(tmp_path / "run", "dense", {"train": {"dtype": "float32"}}, {})
    _, folder = ranks(ran, 1, config, 0, 1)[0]
    rounded = mconv.reshard(folder, tmp_path / "bf16", Layout("hf", dtype="bf16"))
    told = [w for w in rounded.warnings if w.startswith("lossy")]
    assert len(told) == 1
    assert "are rounded to bfloat16" in told[0]
    exact = mconv.reshard(folder, tmp_path / "exact", Layout("hf"))
    assert not [w for w in exact.warnings if "lossy" in w]
    kept = mconv.reshard(
        folder, tmp_path / "kept", Layout("deepspeed", dp=2, zero_stage=2, dtype="bf16")
    )
    assert not [w for w in kept.warnings if "lossy" in w]  # the masters are written along
