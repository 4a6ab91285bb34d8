"""Several processes write what one writes: forked ones, and those of torchrun."""

from __future__ import annotations

import os
import re
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


def test_the_workers_of_a_command_are_measured_together(source: Path, tmp_path: Path) -> None:
    done = mconv("reshard", source, tmp_path / "one", *MEGATRON, "--workers", "3", "--measure")
    assert done.code == 0, done.err
    said = re.search(r"of CPU time, (\S+ \S+) read, (\S+ \S+) written, peak memory", done.err)
    assert said, done.err
    assert "in the largest of 4 processes" in done.err
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    number, unit = said[2].split()
    size = sum(f.stat().st_size for f in (tmp_path / "one").rglob("*") if f.is_file())
    assert float(number) * units[unit] >= 0.99 * size


@pytest.mark.parametrize("options", [(), ("--workers", "2")])
def test_a_roundtrip_by_forked_workers(
    source: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    via = ("--via", "megatron:tp=2", "--via", "dcp:dp=3", "--work", tmp_path)
    done = mconv("roundtrip", source, *via, *options)
    assert done.code == 0, done.err
    assert "lossless" in done.out
    assert not tree(tmp_path)


def test_a_roundtrip_under_torchrun(source: Path, tmp_path: Path) -> None:
    via = ("--via", "megatron:tp=2", "--via", "dcp:dp=3", "--work", tmp_path)
    done = torchrun(2, "roundtrip", source, *via, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.count("lossless") == 1
    assert not [n for n in tree(tmp_path) if "roundtrip" in n]
