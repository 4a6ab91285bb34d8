"""Several processes write what one writes: forked ones, and those of torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import TRAINED, Outcome, mconv, process, tree
from .synthetic import llama

DEEPSPEED = ("--to", "deepspeed", "--zero-stage", "3", "--dp", "3", "--dtype", "bf16")
MEGATRON = ("--to", "megatron", "--tp", "4", "--pp", "2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    llama(folder, layers=2, ffn=1024)
    return folder


def torchrun(count: int, *args: object, cwd: Path) -> Outcome:
    """Run a command under torchrun, as a user does."""
    pytest.importorskip("torch")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc-per-node", str(count), "-m", "mconv", *map(str, args)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=cwd, timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)


def same(one: Path, other: Path) -> None:
    assert tree(one) == tree(other)
    for name in tree(one):
        if (one / name).is_file():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("to", [DEEPSPEED, MEGATRON], ids=["zero3", "megatron"])
def test_forked_workers_write_the_same(source: Path, tmp_path: Path, to: tuple[str, ...]) -> None:
    for workers in ("1", "3"):
        done = mconv("reshard", source, tmp_path / workers, *to, "--workers", workers)
        assert done.code == 0, done.err
    same(tmp_path / "1", tmp_path / "3")


def test_forked_workers_write_the_same_gguf(tmp_path: Path) -> None:
    model = next(p.parent for p in sorted(TRAINED.rglob("config.json")))
    for workers in ("1", "2"):
        out = tmp_path / workers / "model.gguf"
        done = mconv("to-gguf", model, out, "--type", "q4_k_m", "--workers", workers)
        assert done.code == 0, done.err
    same(tmp_path / "1", tmp_path / "2")


def test_torchrun_writes_the_same(source: Path, tmp_path: Path) -> None:
    assert mconv("reshard", source, tmp_path / "one", *MEGATRON).code == 0
    done = torchrun(2, "reshard", source, tmp_path / "two", *MEGATRON, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.count("wrote ") == 1  # one rank speaks for all
    same(tmp_path / "one", tmp_path / "two")
    again = torchrun(2, "reshard", source, tmp_path / "two", *MEGATRON, cwd=tmp_path)
    assert again.code != 0
    assert "exists; use --force" in again.err
    assert "Traceback" not in again.err.partition("torch/distributed")[0]


def test_torchrun_can_be_left_out(source: Path, tmp_path: Path) -> None:
    """A script under torchrun that calls the command for itself alone."""
    own = os.environ | {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}
    done = process("reshard", source, tmp_path / "one", *MEGATRON, "--workers", "1", env=own)
    assert done.code == 0, done.err
    assert done.out.count("wrote ") == 1
