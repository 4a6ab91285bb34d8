"""The command line: exit codes, JSON, quiet, one clear error, nothing written on refusal."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mconv.errors import counted
from mconv.shardio.writers import writers
from safetensors.numpy import save_file


def mconv(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mconv", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def zero3(fixtures_dir: Path) -> Path:
    return fixtures_dir / "deepspeed/z3_dp2_bf16/ckpt"


def test_help_lists_the_commands_without_importing_them() -> None:
    out = mconv("--help")
    assert out.returncode == 0
    for name in ("inspect", "reshard", "to-gguf", "quantize", "diff"):
        assert name in out.stdout


@pytest.mark.parametrize("command", ["inspect", "reshard", "to-gguf", "quantize", "diff"])
def test_every_command_has_help(command: str) -> None:
    out = mconv(command, "--help")
    assert out.returncode == 0, out.stderr
    assert "Usage: mconv" in out.stdout
    if command == "reshard":
        for target in writers():
            assert target in out.stdout.replace("-\n" + " " * 34, "-")


def test_inspect_tells_people_and_programs(zero3: Path) -> None:
    text = mconv("inspect", zero3)
    assert text.returncode == 0, text.stderr
    assert "zero_stage=3" in text.stdout
    assert "whole" in text.stdout
    data = json.loads(mconv("inspect", zero3, "--json").stdout)
    assert data["format"] == "deepspeed"
    assert data["layout"] == {"dp": 2, "zero_stage": 3}
    assert data["whole"] is True
    assert data["parameters"] == sum(_size(t["shape"]) for t in data["tensors"])


def _size(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def test_reshard_and_diff(zero3: Path, tmp_path: Path) -> None:
    out = mconv("reshard", zero3, tmp_path / "hf", "--with-optimizer")
    assert out.returncode == 0, out.stderr
    assert "wrote" in out.stdout
    assert mconv("diff", zero3, tmp_path / "hf", "--with-optimizer").returncode == 0
    small = mconv("reshard", zero3, tmp_path / "bf16", "--dtype", "bf16", "--json")
    assert json.loads(small.stdout)["tensors"] == 30
    different = mconv("diff", zero3, tmp_path / "bf16")
    assert different.returncode == 1
    assert "max rel" in different.stdout
    assert mconv("diff", zero3, tmp_path / "bf16", "--tolerance", "0.01").returncode == 0
    assert "30 of the tensors that differ are float32 (its fp32 masters)" in different.stdout
    assert "bfloat16 on the right" in different.stdout and "--rounded" in different.stdout
    rounded = mconv("diff", tmp_path / "bf16", zero3, "--rounded")
    assert (rounded.returncode, rounded.stdout) == (0, "30 of 30 common tensors are equal\n")


def test_quiet_prints_nothing(zero3: Path, tmp_path: Path) -> None:
    out = mconv("reshard", zero3, tmp_path / "hf", "-q")
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "ABSENT"], "no such file or folder"),
        (["reshard", "ZERO3", "OUT", "--to", "hff"], "did you mean 'hf'"),
        (["reshard", "ZERO3", "OUT", "--dtype", "bf61"], "did you mean"),
        (["reshard", "ZERO3", "OUT", "--max-shard-size", "5XB"], "not a size"),
        (["reshard", "ZERO3", "OUT", "--format", "deepsped"], "did you mean 'deepspeed'"),
        (["to-gguf", "ZERO3", "OUT", "--type", "q9_0"], "q9_0"),
        (["reshad", "ZERO3", "OUT"], "did you mean 'reshard'"),
        (["reshard", "ZERO3"], "Missing argument"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_input_is_one_error_and_exit_code_2(
    zero3: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    names = {"ZERO3": zero3, "OUT": tmp_path / "out", "ABSENT": tmp_path / "absent"}
    out = mconv(*(names.get(a, a) for a in args))
    assert out.returncode == 2
    assert message in out.stderr
    assert "Traceback" not in out.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    out = mconv("--debug", "inspect", tmp_path / "absent")
    assert "Traceback" in out.stderr


def test_a_cast_that_would_lose_the_weights_is_refused(zero3: Path, tmp_path: Path) -> None:
    out = mconv("reshard", zero3, tmp_path / "hf", "--dtype", "int8")
    assert out.returncode == 2
    assert "give f32, f16 or bf16" in out.stderr
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_not_there_takes_no_gguf(zero3: Path, tmp_path: Path) -> None:
    out = mconv("to-gguf", zero3, f"{tmp_path}/gguf/")
    assert out.returncode == 2
    assert "no such folder" in out.stderr
    assert not any(tmp_path.iterdir())


def test_check_tells_the_whole_command() -> None:
    trained = Path(__file__).parent / "fixtures/trained"
    model = trained / "hf"
    out = mconv("check", trained / "zero3", "--config", model, "--tokenizer", model)
    assert out.returncode == 0, out.stderr
    assert f"--type f16 --config {model} --tokenizer {model}" in out.stdout


def test_what_a_disk_refuses_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    from mconv import cli

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "out/Modelfile")

    monkeypatch.setattr(cli.cli, "main", refuse)
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_force_replaces_what_is_no_folder(zero3: Path, tmp_path: Path, kind: str) -> None:
    target, linked = tmp_path / "out/hf", tmp_path / "linked"
    target.parent.mkdir()
    if kind == "file":
        target.write_text("old")
    else:
        target.symlink_to(linked)
    if kind == "link":
        linked.mkdir()
        (linked / "kept").touch()
    out = mconv("reshard", zero3, target, "--force")
    assert out.returncode == 0, out.stderr
    assert [p.name for p in target.parent.iterdir()] == ["hf"]
    assert (target / "model.safetensors").is_file() and not target.is_symlink()
    assert kind != "link" or (linked / "kept").exists()


def test_one_thing_is_not_several(tmp_path: Path) -> None:
    save_file({"a.weight": np.zeros((2, 3), np.float32)}, tmp_path / "model.safetensors")
    shown = mconv("inspect", tmp_path).stdout
    assert "6 in 1 tensor, " in shown and ", 1 file\n" in shown and "1 piece of weights" in shown
    done = mconv("reshard", tmp_path, tmp_path / "out")
    assert "1 tensor, 6 parameters, " in done.stdout
    assert [counted(n, "tensor is", "tensors are") for n in (0, 1, 2000)] == [
        "0 tensors are", "1 tensor is", "2,000 tensors are",
    ]  # fmt: skip
