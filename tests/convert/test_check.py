"""``mconv check`` and ``mconv archs``: everything in the way at once, and what would be written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from mconv.cli import cli
from mconv.convert.architectures import architectures
from mconv.convert.check import check_model
from mconv.convert.to_gguf import to_gguf
from mconv.errors import MconvError
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny_archs

RECORDS = json.loads((Path(__file__).parent.parent / "fixtures" / "arch_digests.json").read_text())


@pytest.fixture
def model(tmp_path: Path, data_dir: Path) -> Path:
    folder = tmp_path / "m"
    tiny_archs.write_recorded(RECORDS["deepseek2-v3"], folder, data_dir, "deepseek2-v3")
    return folder


def change(folder: Path, weights: dict[str, np.ndarray] | None = None, **config: Any) -> None:
    if weights is not None:
        save_file(weights, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def test_a_sound_model(model: Path, tmp_path: Path) -> None:
    result = check_model(model, "q8_0", out=tmp_path / "x.gguf")
    assert result.passed and result.architecture == "deepseek2" and result.type == "Q8_0"
    assert not (tmp_path / "x.gguf").exists()
    report = to_gguf(model, tmp_path / "x.gguf", "q8_0")
    assert result.nbytes == report.nbytes == (tmp_path / "x.gguf").stat().st_size
    assert [(t.name, t.type, t.nbytes) for t in result.tensors] == [
        (t.name, t.type.name, t.nbytes) for t in report.tensors
    ]
    stack = next(t for t in result.tensors if t.name == "blk.1.ffn_up_exps.weight")
    assert stack.source == "model.layers.1.mlp.experts.*.up_proj.weight"
    assert stack.shape == (4, 256, 256)
    assert result.vocabulary is not None
    assert result.vocabulary.pre == "deepseek-llm" and result.vocabulary.specials
    assert sum(result.vocabulary.kinds.values()) == result.vocabulary.tokens
    assert result.memory > 0 and result.free > result.nbytes


def test_everything_at_once(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    for name in list(weights):
        if "layers.1.mlp.experts" in name and "up_proj" in name:
            del weights[name]
        if "layers.2.mlp.experts.3" in name:
            del weights[name]
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    weights["model.layers.0.mlp.upp_proj.weight"] = np.zeros((3, 3), np.float32)
    weights["model.layers.3.enorm.weight"] = np.zeros(3, np.float32)  # multi-token prediction
    change(model, weights)
    (model / "tokenizer.json").unlink()
    result = check_model(model)
    assert not result.passed and not result.tensors and result.vocabulary is None
    told = "\n".join(result.problems)
    for text in (
        "missing: model.layers.1.mlp.experts.*.up_proj.weight (4 tensors)",
        "missing: model.layers.2.mlp.experts.3.down_proj.weight",
        "missing: model.layers.2.mlp.experts.3.gate_proj.weight",
        "unknown: model.layers.0.mlp.upp_proj.weight (did you mean",
        "shape: model.layers.0.mlp.up_proj.weight is [3, 3]",
        "--tokenizer",
    ):
        assert text in told
    assert result.ignored == ("model.layers.3.enorm.weight",)


def test_hazards(model: Path) -> None:
    assert [t for t in check_model(model).tensors if "reaches further" in t.hazard]
    assert not [t for t in check_model(model, "bf16").tensors if t.hazard]
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e6
    weights["model.layers.2.mlp.experts.3.up_proj.weight"][0, 0] = np.nan
    change(model, weights)
    seen: list[tuple[int, int]] = []
    result = check_model(model, scan=True, progress=lambda done, total: seen.append((done, total)))
    found = {t.source: t.hazard for t in result.tensors if t.hazard}
    assert found == {
        "model.layers.0.mlp.up_proj.weight": "1 values exceed F16 (up to 9.994e+05); use bf16 or "
        "f32",
        "model.layers.2.mlp.experts.*.up_proj.weight": "1 values are NaN or infinite",
    }
    assert seen[-1][0] == seen[-1][1] > 0


def test_unknown_models(model: Path) -> None:
    change(model, architectures=["MptForCausalLM"])
    result = check_model(model)
    assert result.architecture is None and "MptForCausalLM" in result.problems[0]


def test_errors_name_the_configuration_that_was_given(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"model_type": "nope"}')
    wanted = f"{mine}: model 'nope' is not supported"
    (problem,) = check_model(model, config=mine).problems
    assert problem.startswith(wanted)
    with pytest.raises(MconvError, match=f"^{re.escape(wanted)}"):
        to_gguf(model, tmp_path / "x.gguf", config=mine)
    change(model, model_type="nope", architectures=["Nope"])
    (problem,) = check_model(model).problems
    assert problem.startswith(f"{model / 'config.json'}: model 'Nope'")


def test_commands(model: Path) -> None:
    run = CliRunner().invoke(cli, ["check", str(model), "--type", "q4_k_m", "--tensors"])
    assert run.exit_code == 0, run.output
    assert "deepseek2" in run.output and "nothing is in the way" in run.output
    assert "blk.1.ffn_up_exps.weight" in run.output
    run = CliRunner().invoke(cli, ["check", str(model), "--json"])
    found = json.loads(run.stdout)
    assert found["passed"] and found["tensors"][0]["name"] == "output.weight"
    change(model, num_hidden_layers=2)
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    change(model, weights)
    run = CliRunner().invoke(cli, ["check", str(model)])
    assert run.exit_code == 2 and "problem: missing: model.norm.weight" in run.output


def test_list_of_architectures() -> None:
    run = CliRunner().invoke(cli, ["archs"])
    assert run.exit_code == 0
    for record in architectures().values():
        assert record.name in run.output and record.classes[0] in run.output
    found = json.loads(CliRunner().invoke(cli, ["archs", "--json"]).stdout)
    assert len(found) == len(architectures()) and "llama" in {one["family"] for one in found}
