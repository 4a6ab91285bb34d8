"""``mconv pipeline``: from a TOML file and text to proven models, each stage once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from mconv.cli import cli
from mconv.convert.gguf import open_gguf
from mconv.shardio import open_checkpoint
from mconv.trainer.delivery.demo import documents
from mconv.trainer.text.train_tokenizer import train_tokenizer

RUN = """
[model]
model_type = "{kind}"
vocab_size = 320
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
{more}

[train]
steps = {steps}
seq_len = 32
batch = 4
threads = 1

[optim]
lr = 3e-3

[data]
tokens = "text.txt"
tokenizer = "tokenizer"

[save]
folder = "{folder}"

[eval]
prompt = "The lighthouse"
sample_tokens = 8

[imatrix]
at_end = true
batches = 2
{sections}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    train_tokenizer(documents(), folder / "tokenizer", 320)
    (folder / "text.txt").write_text("\n\n".join(documents()), encoding="utf-8")
    return folder


def write(place: Path, name: str, **values: Any) -> Path:
    defaults = {"kind": "llama", "more": "", "steps": 4, "folder": name, "sections": ""}
    path = place / f"{name}.toml"
    path.write_text(RUN.format(**{**defaults, **values}), encoding="utf-8")
    return path


def piped(path: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["pipeline", str(path), "--json", *options])
    assert done.exit_code == 0, done.output + done.stderr + repr(done.exception)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def first(place: Path) -> dict[str, Any]:
    return piped(write(place, "whole"), "--nproc", "2", "--type", "f32,q4_k_m")


def test_a_misspelt_type_is_told_before_the_training(place: Path) -> None:
    done = CliRunner().invoke(cli, ["pipeline", str(write(place, "typo")), "--type", "q4_k_x"])
    assert "did you mean 'q4_k" in str(done.exception)
    run = write(place, "typo", sections='[export]\ntypes = ["q4_k_x"]')
    done = CliRunner().invoke(cli, ["train", str(run)])
    assert "did you mean 'q4_k" in str(done.exception)
    assert not (place / "typo").exists()


def test_torchrun_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    done = CliRunner().invoke(cli, ["pipeline", str(write(place, "ranks"))])
    assert "starts its own ranks" in str(done.exception)
    assert not (place / "ranks").exists()


def test_everything_is_made_and_proven(place: Path, first: dict[str, Any]) -> None:
    assert first["ok"]
    assert len(first["proofs"]) >= 5
    made = place / "whole" / "export"
    assert set(first["files"]) == {"whole-F32.gguf", "whole-Q4_K_M.gguf"}
    quantized = open_gguf(made / "whole-Q4_K_M.gguf")
    assert "quantize.imatrix.file" in quantized
    assert (made / "Modelfile").read_text().startswith("FROM ./whole-Q4_K_M.gguf\n")
    assert set(first["perplexity"]) == {"torch", "F32", "Q4_K_M"}
    assert first["text"].startswith("The lighthouse")


def test_what_is_there_is_not_made_again(place: Path, first: dict[str, Any]) -> None:
    made = place / "whole" / "export"
    kept = made / "whole-F32.gguf"
    before = kept.stat().st_mtime_ns
    bytes_ = (made / "whole-Q4_K_M.gguf").read_bytes()
    (made / "whole-Q4_K_M.gguf").unlink()
    again = piped(place / "whole.toml", "--nproc", "2", "--type", "f32,q4_k_m")
    assert again["ok"]
    assert kept.stat().st_mtime_ns == before
    assert (made / "whole-Q4_K_M.gguf").read_bytes() == bytes_
    told = {s["name"]: s["detail"] for s in again["stages"]}
    assert "there already" in told["merge"]
    assert "there already" not in told["to-gguf Q4_K_M"]


def test_training_goes_on_where_it_was(place: Path, first: dict[str, Any]) -> None:
    shutil.copytree(place / "whole", place / "longer")
    said = piped(write(place, "longer", steps=6), "--type", "q8_0")
    assert said["ok"]
    folders = [p.name for p in (place / "longer").glob("step-*")]
    assert sorted(folders) == ["step-00000004", "step-00000006"]


def test_a_run_with_an_export_section_exports(place: Path) -> None:
    path = write(place, "short", steps=1, sections='[export]\ntypes = ["q8_0"]')
    done = CliRunner().invoke(cli, ["train", str(path), "--json"])
    assert done.exit_code == 0, done.output + done.stderr + repr(done.exception)
    assert json.loads(done.stdout)["last"]["step"] == 1
    assert (place / "short" / "export" / "short-Q8_0.gguf").is_file()


def test_an_adapter_is_merged(place: Path, first: dict[str, Any]) -> None:
    start = place / "whole" / "step-00000004"
    path = write(
        place, "tuned", more=f'init_from = "{start}"', sections="[lora]\nrank = 4\nalpha = 64.0"
    )
    said = piped(path, "--type", "f32")
    assert said["ok"]
    base, merged = open_checkpoint(start), open_checkpoint(place / "tuned" / "export" / "merged")
    assert set(base.weights) == set(merged.weights)
    changed = {
        n for n, t in merged.weights.items() if not np.array_equal(t.read(), base.weights[n].read())
    }
    assert changed == {
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkvo"
    }


def test_experts_are_exported(place: Path) -> None:
    more = "num_experts = 4\nmoe_intermediate_size = 32"
    path = write(place, "experts", kind="mixtral", more=more, sections="[parallel]\nep = 2")
    said = piped(path, "--nproc", "2", "--type", "f32,q8_0")
    assert said["ok"]
    file = open_gguf(place / "experts" / "export" / "experts-F32.gguf")
    assert "blk.0.ffn_gate_exps.weight" in file.tensors
