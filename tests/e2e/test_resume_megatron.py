"""Megatron trains, its checkpoint is resharded, Megatron or DeepSpeed goes on from it.

Real megatron-core on four CPU ranks: plain and distributed optimizer, tensor, pipeline, virtual
pipeline and expert parallel, legacy and ``torch_dist`` files. The loss equals that of the run that
was not interrupted; with zeroed moments it does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")
transformers = pytest.importorskip("transformers")

HERE = Path(__file__).parent
MEGATRON = (
    "tp2 to pp2 to tp2 pp2 vpp2",
    "distributed optimizer, tp2 to pp2",
    "torch_dist, pp2 to tp4",
    "experts, ep2 to tp2",
)
DEEPSPEED = "megatron to zero-3"
MIDDLE = 3  # as in megatron_training.py
TOLERANCE = 3e-4  # fp32 sums in other orders, once through Adam's quotient of small numbers


def save_models(folder: Path) -> None:
    """The starting points."""
    base = {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "intermediate_size": 48,
        "rms_norm_eps": 1e-5, "pad_token_id": 0,
    }  # fmt: skip
    experts = transformers.MixtralConfig(**base, num_local_experts=4, num_experts_per_tok=2)
    models = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**base)),
        "mixtral": transformers.MixtralForCausalLM(experts),
    }
    for name, model in models.items():
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.float().save_pretrained(folder / name)


def run(*line: object) -> None:
    """Run a process; its output is shown when it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, line)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    tmp = tmp_path_factory.mktemp("megatron")
    save_models(tmp / "models")
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 4)
    run(*ranks, HERE / "megatron_training.py", tmp / "models", tmp / "out.json")
    found: dict[str, dict[str, list[float]]] = json.loads((tmp / "out.json").read_text())
    if DEEPSPEED in found:
        pytest.importorskip("deepspeed")
        truth, made = found[DEEPSPEED]["truth"], found[DEEPSPEED]["last"]
        out = tmp / "zero.json"
        run(HERE / "hf_deepspeed.py", tmp / "models/llama", made, MIDDLE, len(truth), out)
        found[DEEPSPEED] |= json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", [*MEGATRON, DEEPSPEED])
def test_the_loss_goes_on(results: dict[str, dict[str, list[float]]], case: str) -> None:
    losses = results[case]
    truth = losses["truth"][MIDDLE:]
    assert len(losses["resumed"]) == len(truth)
    assert truth[0] - min(truth) > 0.1
    assert losses["resumed"] == pytest.approx(truth, abs=TOLERANCE)


@pytest.mark.parametrize("case", [*MEGATRON, DEEPSPEED])
def test_zeroed_moments_show(results: dict[str, dict[str, list[float]]], case: str) -> None:
    losses = results[case]
    pairs = zip(losses["truth"][MIDDLE:], losses["control"], strict=True)
    assert max(abs(a - b) for a, b in pairs) > 0.03
