"""The demo end to end, with few steps: everything it claims is looked at again."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from mconv.cli import cli  # noqa: E402
from mconv.convert.gguf import open_gguf  # noqa: E402
from mconv.convert.llamacpp import have_llamacpp  # noqa: E402
from mconv.convert.verify import verify_gguf  # noqa: E402
from mconv.trainer.delivery import proof  # noqa: E402
from mconv.trainer.delivery.proof import load_model  # noqa: E402

STEPS = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a demo and what ``--json`` said."""
    folder = tmp_path_factory.mktemp("demo") / "made"
    done = CliRunner().invoke(
        cli, ["demo", "--dir", str(folder), "--steps", str(STEPS), "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


def test_every_proof_holds(made: tuple[Path, dict[str, Any]]) -> None:
    _, said = made
    assert said["ok"]
    assert len(said["proofs"]) == (8 if have_llamacpp() else 7)
    assert all(p["ok"] for p in said["proofs"])
    assert len(said["metrics"]) == STEPS
    assert said["metrics"][-1]["loss"] < said["metrics"][0]["loss"]
    assert said["text"].startswith(said["prompt"])
    assert set(said["perplexity"]) == {"torch", "F32", "Q8_0", "Q4_K_M"}
    assert abs(said["perplexity"]["Q8_0"] / said["perplexity"]["torch"] - 1) < 0.01
    assert said["inspection"]["layout"] == {"dp": 2}


def test_the_folder_is_usable(made: tuple[Path, dict[str, Any]]) -> None:
    folder, said = made
    shards = folder / "run" / f"step-{STEPS:08d}"
    names = {p.name for p in shards.iterdir()}
    assert {f"shard-0000{r}-model-00001-of-00002.safetensors" for r in (1, 2)} <= names
    types = {}
    for name, size in said["files"].items():
        assert (folder / name).stat().st_size == size
        file = open_gguf(folder / name)
        assert file["general.name"] == "Lighthouse"
        types[name] = {t.type.name for t in file.tensors.values()}
    assert types == {
        "lighthouse-F32.gguf": {"F32"},
        "lighthouse-Q8_0.gguf": {"F32", "Q8_0"},
        "lighthouse-Q4_K_M.gguf": {"F32", "Q4_K", "Q6_K"},
    }
    lines = (folder / "Modelfile").read_text().splitlines()
    assert (folder / lines[0].removeprefix("FROM ")).is_file()
    assert 'TEMPLATE "{{ .Prompt }}"' in lines


def test_transformers_opens_the_merged_folder(made: tuple[Path, dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    folder, _ = made
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    model = load_model(folder / "run" / f"step-{STEPS:08d}")
    ids = torch.arange(40).reshape(2, 20) + 100
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lighthouse-F32.gguf", "lighthouse-Q4_K_M.gguf"])
def test_damage_is_found(made: tuple[Path, dict[str, Any]], tmp_path: Path, name: str) -> None:
    folder, _ = made
    path = tmp_path / name
    shutil.copyfile(folder / name, path)
    info = open_gguf(path).tensors["blk.1.ffn_up.weight"]
    with path.open("r+b") as file:
        file.seek(info.offset + info.nbytes - 4)  # one weight, or the last quarter of a block
        file.write(np.float32(1.0).tobytes())
        if info.type.is_quantized:
            file.seek(info.offset)
            file.write(np.float16(8.0).tobytes())  # the scale of a block
    check = verify_gguf(path, folder / "merged")
    assert not check.ok
    assert [t.name for t in check.tensors if not t.ok] == ["blk.1.ffn_up.weight"]


def test_proofs_can_fail(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = made
    shards = folder / "run" / f"step-{STEPS:08d}"
    merged = tmp_path / "merged"
    shutil.copytree(folder / "merged", merged)
    with (merged / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    for one in (
        proof.merged_equals_shards(merged, shards),
        proof.merged_equals_torch(merged, load_model(shards)),
        proof.gguf_equals_model(folder / "lighthouse-F32.gguf", merged),
    ):
        assert not one.ok
        assert "38 of 39" in one.detail
    if have_llamacpp():
        one = proof.llamacpp_says_the_same(
            folder / "lighthouse-F32.gguf", [1, 300, 301], [1, 1], [0.0, 0.0], 2, 2
        )
        assert not one.ok
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(b"GGUF")
        one = proof.llamacpp_says_the_same(broken, [1], [1], [0.0], 1, 2)
        assert not one.ok
        assert "llama.cpp does not run this model" in one.detail


def test_a_failed_proof_is_a_failed_command(
    made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mconv.trainer.delivery import demo

    folder, said = made
    report = demo.DemoReport(
        folder=folder,
        stages=(),
        inspection=None,  # type: ignore[arg-type]  # not rendered
        metrics=(),
        proofs=(proof.Proof("one is two", False, "it is not"),),
        prompt=said["prompt"],
        text=said["text"],
        files=said["files"],
        perplexity=said["perplexity"],
    )
    monkeypatch.setattr(demo, "demo", lambda *_, **__: report)
    done = CliRunner().invoke(cli, ["demo"])
    assert done.exit_code == 1
    assert re.search(r"failed: one is two: it is not", done.stderr)
    monkeypatch.setattr(
        demo, "demo", lambda *_, **__: replace(report, proofs=(proof.Proof("x", True, ""),))
    )
    assert CliRunner().invoke(cli, ["demo"]).exit_code == 0


def test_folders_of_others_are_left_alone(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = made
    (tmp_path / "run.toml").touch()
    (tmp_path / "mine").write_text("keep")
    for place, said in [(folder, "holds an earlier demo"), (tmp_path, "other things than a demo")]:
        force = ["--force"] if place == tmp_path else []
        done = CliRunner().invoke(cli, ["demo", "--dir", str(place), *force])
        assert done.exit_code
        assert said in str(done.exception)
    assert (tmp_path / "mine").read_text() == "keep"
