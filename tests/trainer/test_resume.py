"""Saving and resuming: the same layout goes on bitwise, every other one with the same state."""

from __future__ import annotations

import json
import os
import signal
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.errors import ConfigError, FormatError, OutputError
from mconv.shardio import Layout, open_checkpoint
from mconv.trainer import checkpoint, resume, shards
from mconv.trainer.hooks import Hook, Run
from mconv.trainer.loop import new_run, one_step, run_steps
from mconv.trainer.mesh import build_meshes, process_group
from mconv.trainer.settings import RunConfig
from mconv.trainer.settings.degrees import resolve
from mconv.trainer.shards import assign

from .ranks import Ranks
from .toys import ToyData, run_config

Losses = list[float]

#: (model, layout that saves, ranks, layout that resumes, ranks)
CASES: list[tuple[str, dict[str, Any], int, dict[str, Any], int]] = [
    ("dense", {}, 2, {}, 1),
    ("tied", {"zero": 1}, 2, {"pp": 2}, 2),
    ("gqa", {"tp": 2, "dp_shard": 2}, 4, {"zero": 2}, 2),
    ("moe", {"ep": 2}, 2, {"tp": 2}, 2),
    ("moe", {}, 1, {"ep": 2, "dp_shard": 4}, 4),
    ("dense", {"pp": 2, "dp_shard": 2}, 4, {"tp": 2}, 2),
    ("tied", {"pp": 2, "schedule": "Interleaved1F1B"}, 2, {"zero": 0}, 2),
    ("gqa", {"cp": 2}, 2, {}, 1),
]


def settings(folder: Path, model: str, more: dict[str, Any], **save: Any) -> RunConfig:
    config = run_config(model, train={"steps": 6}, **more)
    return replace(config, save=replace(config.save, folder=folder, formats=("shards",), **save))


def ran(
    rank: int, world: int, store: Path, config: RunConfig, first: int, last: int
) -> tuple[Losses, str]:
    """Train from step ``first`` (a checkpoint, if not 0) to ``last`` and save."""
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        hook = resume.CheckpointHook()
        hook.start(run)
        assert run.state.step == first
        losses = [one_step(run).loss for _ in range(first, last)]
        hook.stop(run)
    return losses, str(checkpoint.step_folder(config.save.folder, last))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = open_checkpoint(folder)
    out = {n: t.read() for n, t in found.weights.items()}
    for state, group in found.optimizer.items():
        out |= {f"{state}.{n}": t.read() for n, t in group.items()}
    return out


def plain(ranks: Ranks, tmp_path: Path, model: str) -> Losses:
    return ranks(ran, 1, settings(tmp_path / "plain", model, {}, resume="none"), 0, 6)[0][0]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[3]}".replace(" ", ""))
def test_another_layout_goes_on(ranks: Ranks, tmp_path: Path, case: Any) -> None:
    model, one, world, other, others = case
    before = settings(tmp_path / "run", model, one)
    losses, folder = ranks(ran, world, before, 0, 3)[0]
    after = settings(tmp_path / "run", model, other)
    more, _ = ranks(ran, others, after, 3, 6)[0]
    expected = plain(ranks, tmp_path, model)
    assert np.allclose(losses + more, expected, rtol=0, atol=1e-12)
    # loaded and saved again without a step: bit for bit the same
    again = settings(tmp_path / "again", model, other, resume=folder)
    _, copied = ranks(copied_by, others, again)[0]
    a, b = tensors(Path(folder)), tensors(Path(copied))
    assert a.keys() == b.keys()
    assert len(a) > 100
    for name, value in a.items():
        assert np.array_equal(value, b[name]), name


def copied_by(rank: int, world: int, store: Path, config: RunConfig) -> tuple[None, str]:
    """Load and save at once."""
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        hook = resume.CheckpointHook()
        hook.start(run)
        folder = hook.save(run)
        hook.stop(run)
    return None, str(folder)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_same_layout_goes_on_bitwise(ranks: Ranks, tmp_path: Path, asynchronous: bool) -> None:
    whole = settings(tmp_path / "whole", "gqa", {}, resume="none")
    parted = settings(tmp_path / "parted", "gqa", {}, asynchronous=asynchronous)
    expected, end = ranks(ran, 2, whole, 0, 6)[0]
    first, _ = ranks(ran, 2, parted, 0, 3)[0]
    second, again = ranks(ran, 2, parted, 3, 6)[0]
    assert first + second == expected
    for name, value in tensors(Path(end)).items():
        assert np.array_equal(value, tensors(Path(again))[name]), name


def test_the_folder_says_what_it_is(ranks: Ranks, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "moe", {"ep": 2})
    _, folder = ranks(ran, 2, config, 0, 2)[0]
    found = open_checkpoint(folder)
    assert found.step == 2
    assert found.config is not None
    assert found.config["architectures"] == ["Qwen3MoeForCausalLM"]
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert found.weights[name].shape == (16, 12)
    groups = found.scalars["param_groups"]
    assert {g["weight_decay"] for g in groups} == {0.0, config.optim.weight_decay}
    assert {n for g in groups for n in g["params"]} == set(found.weights)
    assert {g["step"] for g in groups} == {2}
    checkpoint.check_files(Path(folder))
    names = {p.name for p in Path(folder).iterdir()}
    assert {"config.json", "manifest.json", "trainer.json", "training_state.json"} <= names
    assert not [n for n in names if n.startswith(".")]


def test_torch_reads_the_shards(ranks: Ranks, tmp_path: Path) -> None:
    from mconv.trainer.delivery.proof import load_model

    config = settings(tmp_path / "run", "tied", {"tp": 2, "dp_shard": 2})
    config = replace(config, train=replace(config.train, dtype="float32"))
    _, folder = ranks(ran, 4, config, 0, 2)[0]
    model, found = load_model(Path(folder)), open_checkpoint(folder).weights
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            assert np.array_equal(found[name].read(), value.numpy()), name


def killed(rank: int, world: int, store: Path, config: RunConfig) -> None:
    """Die without a word while the second checkpoint is being written."""
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        hook = resume.CheckpointHook()
        hook.start(run)
        one_step(run)
        hook.save(run)
        one_step(run)
        write = shards.write_pieces

        def dying(path: Path, pieces: Any) -> tuple[int, int]:
            if rank == 1 and "-model-00002" in path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, pieces)

        checkpoint.write_pieces = dying
        hook.save(run)


def test_a_killed_save_is_not_seen(ranks: Ranks, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "dense", {})
    with pytest.raises(AssertionError, match="SIGKILL"):
        ranks(killed, 2, config, timeout=30)
    assert [step for step, _ in checkpoint.steps_of(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / ".step-00000002.tmp").is_dir()
    losses, _ = ranks(ran, 2, config, 1, 6)[0]
    assert np.allclose(losses, plain(ranks, tmp_path, "dense")[1:], rtol=0, atol=1e-12)


def failing(rank: int, world: int, store: Path, config: RunConfig) -> str:
    """Have no space on one rank; every rank must hear of it."""
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        hook = resume.CheckpointHook()
        hook.start(run)

        def full(path: Path, pieces: Any) -> tuple[int, int]:
            if rank == 1:
                raise OSError(28, "No space left on device")
            return shards.write_pieces(path, pieces)

        checkpoint.write_pieces = full
        try:
            hook.save(run)
            hook.stop(run)
        except OutputError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_told_on_every_rank(
    ranks: Ranks, tmp_path: Path, asynchronous: bool
) -> None:
    config = settings(tmp_path / "run", "dense", {}, asynchronous=asynchronous)
    for said in ranks(failing, 2, config, timeout=30):
        assert "rank 1" in said
        assert "No space left" in said
    assert checkpoint.steps_of(tmp_path / "run") == []


def kept(rank: int, world: int, store: Path, config: RunConfig) -> list[int]:
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        hook = resume.CheckpointHook()
        hook.start(run)
        for step in range(1, 7):
            run.state.step = step
            hook.step(run, None)
        hook.stop(run)
    return [step for step, _ in checkpoint.steps_of(config.save.folder)]


def test_old_checkpoints_go(ranks: Ranks, tmp_path: Path) -> None:
    more = {"every": 1, "keep_last": 2, "keep_every": 3}
    config = settings(tmp_path / "run", "dense", {}, **more)
    assert ranks(kept, 1, config)[0] == [3, 5, 6]
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_a_broken_newest_checkpoint_is_passed_over(ranks: Ranks, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "dense", {}, every=1)
    ranks(ran, 1, config, 0, 2)
    ranks(ran, 1, config, 2, 3)
    file = tmp_path / "run" / "step-00000003" / "shard-00001-model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found, notes = checkpoint.newest(tmp_path / "run")
    assert found == tmp_path / "run" / "step-00000002"
    assert "shard-00001-model-00002" in notes[0]
    with pytest.raises(FormatError):
        checkpoint.check_files(file.parent)


def ended(rank: int, world: int, store: Path, config: RunConfig) -> int:
    """Be told to end during the second step, on one rank."""

    class Told(Hook):
        def step(self, run: Run, metrics: Any) -> None:
            if rank == 1 and run.state.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        run_steps(run, [Told(), resume.CheckpointHook()])
    return run.state.step


def test_a_signal_saves_and_ends(ranks: Ranks, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "dense", {})
    done = ranks(ended, 2, config)
    assert len(set(done)) == 1
    assert done[0] in (2, 3)
    assert [s for s, _ in checkpoint.steps_of(tmp_path / "run")] == [done[0]]


def refused(rank: int, world: int, store: Path, config: RunConfig) -> str:
    with process_group(rank, world, store):
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), ToyData(config))
        try:
            resume.CheckpointHook().start(run)
        except ConfigError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 4}, "was trained with train.batch=8"),
        ({"resume": "/nowhere/step-1"}, "no such file or folder"),
    ],
)
def test_refusals(ranks: Ranks, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    config = settings(tmp_path / "run", "dense", {})
    ranks(ran, 1, config, 0, 1)
    train = {k: v for k, v in change.items() if k == "batch"}
    save = {k: v for k, v in change.items() if k != "batch"}
    changed = replace(
        config, train=replace(config.train, **train), save=replace(config.save, **save)
    )
    assert words in ranks(refused, 1, changed)[0]


def test_another_optimizer_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "dense", {})
    ranks(ran, 1, config, 0, 1)
    muon = replace(config, optim=replace(config.optim, name="muon"))
    said = ranks(refused, 1, muon)[0]
    assert "no optimizer state momentum_buffer, which optim.name asks for" in said
    assert "(there is exp_avg, exp_avg_sq)" in said


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        (("shards", "shard"), "did you mean 'shards'"),
        (("dcp",), 'must have "shards"'),
        (("shards", "dcp"), "no place for single experts"),
    ],
)
def test_impossible_formats_are_refused(
    tmp_path: Path, formats: tuple[str, ...], words: str
) -> None:
    config = settings(tmp_path / "run", "moe", {})
    with pytest.raises(ConfigError, match=words):
        resolve(replace(config, save=replace(config.save, formats=formats)), 1)


def exported(rank: int, world: int, store: Path, config: RunConfig) -> str:
    return ran(rank, world, store, config, 0, 2)[1]


def test_other_formats_lie_beside_the_shards(ranks: Ranks, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "tied", {})
    config = replace(config, save=replace(config.save, formats=("shards", "dcp", "hf")))
    folder = Path(ranks(exported, 2, config)[0])
    shards = open_checkpoint(folder)
    assert shards.format == "hf_dcp"
    for name, form in (("dcp", "dcp"), ("hf", "hf")):
        found = open_checkpoint(folder / name)
        assert found.format == form
        for key, tensor in shards.weights.items():
            assert np.array_equal(found.weights[key].read(), tensor.read()), key
    moments = open_checkpoint(folder / "dcp").optimizer["exp_avg"]
    for key, tensor in shards.optimizer["exp_avg"].items():
        assert np.array_equal(moments[key].read(), tensor.read()), key
    checkpoint.check_files(folder)


def adjusted(rank: int, world: int, store: Path, config: RunConfig, source: str) -> Losses:
    return ran(rank, world, store, replace(config, save=replace(config.save, resume=source)), 3, 6)[
        0
    ]


@pytest.mark.parametrize(
    "layouts",
    [
        (Layout("hf"),),
        (Layout("megatron", tp=2, pp=2),),
        (Layout("deepspeed", dp=2, zero_stage=3), Layout("dcp", dp=2)),
    ],
    ids=["hf", "megatron", "deepspeed-dcp"],
)
def test_round_trips_through_other_frameworks(
    ranks: Ranks, tmp_path: Path, layouts: tuple[Layout, ...]
) -> None:
    import mconv

    config = settings(tmp_path / "run", "dense", {})
    config = replace(config, train=replace(config.train, dtype="float32"))
    losses, folder = ranks(ran, 2, config, 0, 3)[0]
    straight, _ = ranks(ran, 2, config, 3, 6)[0]
    source = Path(folder)
    for n, layout in enumerate(layouts):
        target = tmp_path / f"out-{n}"
        mconv.reshard(source, target, layout, with_optimizer=True)
        source = target
    other = replace(config, save=replace(config.save, folder=tmp_path / "other"))
    again = ranks(adjusted, 2, other, str(source))[0]
    assert again == straight
    assert len(losses) == 3


def test_every_place_is_written_once_and_evenly() -> None:
    shared = [("a", (0,), (10,)), ("b", (0,), (8,)), ("c", (0,), (2,))]
    own = [[("d", (0,), (6,))], [("d", (6,), (6,))]]
    owners = assign([shared + own[0], shared + own[1]])
    assert owners[own[0][0]] == 0
    assert owners[own[1][0]] == 1
    loads = [sum(p[2][0] for p, r in owners.items() if r == rank) for rank in (0, 1)]
    assert loads == [16, 16]


def test_manifest_is_json(ranks: Ranks, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "dense", {})
    _, folder = ranks(ran, 1, config, 0, 1)[0]
    files = json.loads((Path(folder) / "manifest.json").read_text())["files"]
    for name, entry in files.items():
        data = (Path(folder) / name).read_bytes()
        assert len(data) == entry["bytes"]
        assert f"{zlib.crc32(data):08x}" == entry["crc32"], name
