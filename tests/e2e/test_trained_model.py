"""A trained Llama, as DeepSpeed ZeRO-3 and Megatron-LM TP2 x PP2 saved it, to GGUF: llama.cpp
continues real prompts as transformers does in F32.

``tests/fixtures/make_trained.py`` made the checkpoints and the expectations with the frameworks
themselves; nothing here needs them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv import open_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "convert"))
from harness import TRAINED, mconv

HF = TRAINED / "hf"
#: Source -> (folder, options, which expectation): ZeRO-3 stores fp32 masters, Megatron bf16.
SOURCES: dict[str, tuple[Path, list[str], str]] = {
    "zero3": (TRAINED / "zero3", ["--config", str(HF)], "from_masters"),
    "megatron": (TRAINED / "megatron", [], "continuation"),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Prompts and what transformers in F32 makes of them."""
    return json.loads((TRAINED / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every source in every type."""
    folder = tmp_path_factory.mktemp("gguf")
    for source, (path, options, _) in SOURCES.items():
        for kind in ("f32", "f16", "q8_0"):
            out = folder / f"{source}-{kind}.gguf"
            done = mconv("to-gguf", path, out, "--type", kind, "--tokenizer", HF, *options)
            assert done.code == 0, done.err
    return folder


def runner(path: Path) -> Any:
    """Load a file into llama.cpp."""
    pytest.importorskip("xllamacpp")
    from llamacpp import LlamaCpp

    return LlamaCpp(path)


def loss(model: Any, ids: list[int], count: int) -> float:
    """Return the mean negative log likelihood of the last ``count`` tokens of a text."""
    total = 0.0
    for end in range(len(ids) - count, len(ids)):
        body = {"prompt": ids[:end], "n_predict": 1, "n_probs": 640, "temperature": 0.0}
        answer = model._post("/completion", body)
        top = answer["completion_probabilities"][0]["top_logprobs"]
        total -= next(one["logprob"] for one in top if one["id"] == ids[end])
    return total / count


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("source", SOURCES)
def test_llamacpp_continues_as_transformers(
    ggufs: Path, expected: dict[str, Any], source: str, kind: str
) -> None:
    model = runner(ggufs / f"{source}-{kind}.gguf")
    assert len(expected["cases"]) >= 6
    for case in expected["cases"]:
        assert [1, *model.tokenize(case["text"])] == case["prompt"]
        want = case[SOURCES[source][2]]
        assert len(want) >= 32
        assert model.greedy(case["prompt"], len(want), range(0)) == want, case["text"]


@pytest.mark.parametrize("source", SOURCES)
def test_q8_0_predicts_almost_as_well(ggufs: Path, expected: dict[str, Any], source: str) -> None:
    model = runner(ggufs / f"{source}-q8_0.gguf")
    for case in expected["cases"]:
        want = case[SOURCES[source][2]]
        assert model.greedy(case["prompt"], 1, range(0)) == want[:1]
    # the loss of the trained model itself, in F32: an untrained one has log(640) = 6.46
    found = loss(model, expected["sample"], len(expected["sample"]) - 1)
    assert expected["sample_loss"] < 3
    assert math.isclose(found, expected["sample_loss"], abs_tol=0.02)


def test_zero3_and_megatron_give_the_same_tensors(ggufs: Path, tmp_path: Path) -> None:
    done = mconv("reshard", SOURCES["zero3"][0], tmp_path / "bf16", "--dtype", "bf16",
                 "--config", HF)  # fmt: skip
    assert done.code == 0, done.err
    out = tmp_path / "m.gguf"
    assert mconv("to-gguf", tmp_path / "bf16", out, "--type", "q8_0").code == 0
    twin = (ggufs / "megatron-q8_0.gguf").read_bytes()
    data = 168_256 // 32 * 34  # at most: the norms are F32
    assert out.read_bytes()[-data:] == twin[-data:]


def test_masters_are_the_ones_of_the_run(expected: dict[str, Any]) -> None:
    ckpt = open_checkpoint(TRAINED / "zero3")
    found = {
        name: hashlib.sha256(np.ascontiguousarray(t.read())).hexdigest()
        for name, t in ckpt.optimizer["master"].items()
    }
    assert found == expected["masters"]


@pytest.mark.parametrize("source", SOURCES)
def test_merged_model_is_the_trained_one(tmp_path: Path, source: str) -> None:
    path, options, _ = SOURCES[source]
    done = mconv("reshard", path, tmp_path / "out", "--dtype", "bf16", "--tokenizer", HF, *options)
    assert done.code == 0, done.err
    truth, merged = open_checkpoint(HF).weights, open_checkpoint(tmp_path / "out").weights
    assert sorted(merged) == sorted(truth)
    for name, tensor in truth.items():
        assert merged[name].read().tobytes() == tensor.read().tobytes(), name
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = torch.tensor([json.loads((TRAINED / "expected.json").read_text())["sample"]])
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        want, got = (
            load(folder, dtype=torch.float32, attn_implementation="eager").eval()(ids).logits
            for folder in (HF, tmp_path / "out")
        )
    assert torch.equal(want, got)
