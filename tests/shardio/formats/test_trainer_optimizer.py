"""``optimizer.pt`` beside safetensors, as the Trainer and accelerate leave it, against torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.shardio import open_checkpoint

torch = pytest.importorskip("torch")
SIZES = {"hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2, "vocab_size": 16}
LLAMA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 12}
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 16, "n_positions": 4}


def save(folder: Path, kind: str, file: str, grouped: bool = True, frozen: int = 0, **sizes: Any):
    """Save two steps of a transformers model as its Trainer does; return (model, optimizer)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in list(model.parameters())[:frozen]:
        p.requires_grad = False
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if p.ndim > 1]
    rest = [p for n, p in named if p.ndim == 1]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups if grouped else [p for _, p in named], lr=0.01)
    for _ in range(2):
        model(torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / file)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    return model, optimizer


@pytest.mark.parametrize(
    ("kind", "sizes", "file", "grouped"),
    [
        ("llama", LLAMA, "optimizer.pt", True),
        ("llama", {**LLAMA, "tie_word_embeddings": True}, "optimizer.bin", False),
        ("gpt2", GPT2, "optimizer.pt", True),
    ],
)
def test_states_have_names(
    tmp_path: Path, kind: str, sizes: dict[str, Any], file: str, grouped: bool
) -> None:
    model, optimizer = save(tmp_path, kind, file, grouped, **sizes)
    found = open_checkpoint(tmp_path)
    assert found.step == 2 and not found.warnings
    for state in ("exp_avg", "exp_avg_sq"):
        assert set(found.optimizer[state]) == set(found.weights)
        for name, p in model.named_parameters():
            expected = optimizer.state[p][state].numpy()
            assert np.array_equal(found.optimizer[state][name].read(), expected), name
    groups = found.scalars["param_groups"]
    assert sum(len(g["params"]) for g in groups) == len(found.weights)
    assert groups[0]["lr"] == 0.01


def test_what_cannot_be_named_is_left_out(tmp_path: Path) -> None:
    save(tmp_path, "llama", "optimizer.pt", frozen=3, **LLAMA)
    found = open_checkpoint(tmp_path)
    assert not found.optimizer and "left out" in found.warnings[0]


def test_steps_of_two_saves(tmp_path: Path) -> None:
    save(tmp_path, "llama", "optimizer.pt", **LLAMA)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 5}))
    assert "of step 2, the model of step 5" in open_checkpoint(tmp_path).warnings[0]


def test_a_broken_optimizer_leaves_the_weights(tmp_path: Path) -> None:
    save(tmp_path, "llama", "optimizer.pt", **LLAMA)
    (tmp_path / "optimizer.pt").write_bytes((tmp_path / "optimizer.pt").read_bytes()[:-3000])
    found = open_checkpoint(tmp_path)
    assert found.weights and not found.optimizer
    assert "the optimizer is left out" in found.warnings[0]
