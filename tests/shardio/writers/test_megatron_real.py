"""Real Megatron-Core loads what the Megatron writers write, strictly, and computes the same.

Models of transformers are resharded, loaded by a group of four processes under the same or another
layout, and their logits compared; a training with torch's AdamW goes on in Megatron. Skipped where
megatron-core is not installed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mconv import reshard
from mconv.shardio import Layout

pytest.importorskip("megatron.core")
transformers = pytest.importorskip("transformers")

WORLD = 4
VOCAB = 96
TOKENS = list(range(3, 19))

#: name -> (model, layout written, sizes that the loading run has otherwise)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "kv heads below tp": ("llama", "megatron:tp=4", {}),
    "tied head on the last stage": ("tied", "megatron:tp=2,pp=2", {}),
    "virtual chunks": ("llama", "megatron:tp=2,pp=2,vpp=2", {}),
    "biases": ("qwen2", "megatron:pp=2,pp_layers=3+1", {}),
    "experts": ("mixtral", "megatron:tp=2,ep=2", {}),
    "experts not cut": ("mixtral", "megatron:tp=2,ep=2,etp=1,pp=2", {}),
    "distributed": ("tied", "megatron-dist:tp=2,pp=2", {}),
    "distributed, loaded otherwise": (
        "qwen3",
        "megatron-dist:pp=2",
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ),
    "distributed experts": ("mixtral", "megatron-dist:ep=4", {}),
    "distributed experts, loaded otherwise": (
        "mixtral",
        "megatron-dist:tp=1,ep=2",
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ),
}

#: name -> (layout written, whether the optimizer is loaded)
RESUMED: dict[str, tuple[str, bool]] = {
    "plain": ("megatron:tp=2", True),
    "distributed optimizer": ("megatron:tp=2,zero_stage=1", True),
    "torch_dist": ("megatron-dist:tp=2", True),
    "torch_dist, distributed optimizer": ("megatron-dist:tp=2,pp=2,zero_stage=1", True),
    "more ranks than key/value heads": ("megatron:tp=4", True),
    "more ranks than key/value heads, distributed": ("megatron:tp=4,zero_stage=1", True),
    "control": ("megatron:tp=2", False),
}
RATE, BEFORE, AFTER = 3e-3, 3, 4


def make_model(kind: str) -> Any:
    """A small random model of transformers."""
    base = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "intermediate_size": 48,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": kind == "tied", "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "mixtral":
        more = {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**base, **more))
    elif kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**base, head_dim=16))
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**base))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**base))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.float().eval()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Name of a case to (logits of transformers, file with those of Megatron)."""
    tmp = tmp_path_factory.mktemp("megatron")
    found: dict[str, tuple[Any, Path]] = {}
    wanted: dict[str, Any] = {}
    jobs = []
    for k, (name, (kind, text, sizes)) in enumerate(CASES.items()):
        if kind not in wanted:
            model = make_model(kind)
            model.save_pretrained(tmp / kind)
            with torch.no_grad():
                wanted[kind] = model(torch.tensor([TOKENS])).logits
        layout = Layout.parse(f"{text},transformer_impl=local")
        reshard(tmp / kind, tmp / str(k), layout)
        found[name] = (wanted[kind], tmp / f"{k}.pt")
        jobs.append(
            {
                "format": layout.format,
                "folder": str(tmp / str(k) / "release"),
                "sizes": sizes,
                "tokens": TOKENS,
                "out": str(found[name][1]),
            }
        )
    launch(jobs)
    return found


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, list[float]]]:
    """Losses of a training with transformers, and of its second half in Megatron, by case."""
    tmp = tmp_path_factory.mktemp("resumed")
    wanted = train_and_save(tmp)
    jobs = [resume_job(tmp, k, text, loaded) for k, (text, loaded) in enumerate(RESUMED.values())]
    launch(jobs)
    return wanted, {n: torch.load(j["out"]) for n, j in zip(RESUMED, jobs, strict=True)}


def train_and_save(tmp: Path) -> list[float]:
    """Train, save in between; returns the losses after the save."""
    model = make_model("tied").train()
    model.save_pretrained(tmp / "model")
    decay = [[p for p in model.parameters() if (p.ndim > 1) == d] for d in (True, False)]
    groups = [{"params": p, "weight_decay": w} for p, w in zip(decay, (0.1, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    losses = []
    for step in range(BEFORE + AFTER):
        if step == BEFORE:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step}, tmp / "training.pt")
        ids = torch.tensor([TOKENS])
        logits = model(ids[:, :-1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[BEFORE:]


def resume_job(tmp: Path, k: int, text: str, loaded: bool) -> dict[str, Any]:
    """Reshard the saved training for Megatron."""
    # rows of padding would take part in the softmax
    layout = Layout.parse(f"{text},transformer_impl=local,make_vocab_divisible_by=1")
    report = reshard(tmp / "training.pt", tmp / str(k), layout, config=tmp / "model")
    folder = next(n for n in report.files if "/" in n).partition("/")[0]
    return {
        "format": layout.format,
        "folder": str(tmp / str(k) / folder),
        "sizes": {"pipeline_model_parallel_size": 1},
        "tokens": TOKENS,
        "steps": AFTER,
        "optimizer": loaded,
        "lr": RATE,
        "out": str(tmp / f"{k}.pt"),
    }


def launch(jobs: list[dict[str, Any]]) -> None:
    """Run Megatron in ``WORLD`` processes; their output is shown when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("megatron_process.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(jobs)],
        env={
            **os.environ,
            "WORLD_SIZE": str(WORLD),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout[-3000:])


@pytest.mark.parametrize("name", CASES)
def test_megatron_computes_what_transformers_computes(
    results: dict[str, tuple[Any, Path]], name: str
) -> None:
    wanted, file = results[name]
    logits = torch.load(file)[..., :VOCAB]
    assert float(wanted.abs().max()) > 0.5
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_training_goes_on_as_if_nothing_happened(
    resumed: tuple[list[float], dict[str, list[float]]], name: str
) -> None:
    wanted, found = torch.tensor(resumed[0]), torch.tensor(resumed[1][name])
    assert float(wanted[0] - wanted[-1]) > 0.05
    if name == "control":
        assert float((found - wanted).abs().max()) > 0.01
    else:
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
