"""Real Megatron-Core loads what the Megatron writers write, strictly, and computes the same.

Models of transformers are resharded, loaded by a group of four processes under the same or another
layout, and their logits compared. Skipped where megatron-core is not installed.
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
VOCAB = 97
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


def launch(jobs: list[dict[str, Any]]) -> None:
    """Run Megatron in ``WORLD`` processes; their output is shown when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("megatron_process.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), json.dumps(jobs)],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(WORLD),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            pytest.fail(output[-3000:])


@pytest.mark.parametrize("name", CASES)
def test_megatron_computes_what_transformers_computes(
    results: dict[str, tuple[Any, Path]], name: str
) -> None:
    wanted, file = results[name]
    logits = torch.load(file)[..., :VOCAB]
    assert float(wanted.abs().max()) > 0.5
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
