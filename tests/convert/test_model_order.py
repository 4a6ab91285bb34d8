"""The order of parameters by their names, against transformers' own models."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mconv.convert.model_order import in_model_order
from mconv.shardio import Checkpoint, from_array

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 64, "n_embd": 32, "n_layer": 12, "n_head": 4,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox",
         "phi", "olmo2", "starcoder2", "stablelm", "granite", "cohere", "smollm3"]  # fmt: skip


def checkpoint(names: list[str], format: str = "hf") -> Checkpoint:
    one = from_array(np.zeros(1, np.float32))
    return Checkpoint(path=Path("memory"), format=format, weights=dict.fromkeys(names, one))


@pytest.mark.parametrize("model_type", TYPES)
def test_equals_transformers(model_type: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **SMALL)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = [n for n, _ in model.named_parameters()]
    shuffled = random.Random(0).sample(names, len(names))
    got = in_model_order(checkpoint(shuffled))
    assert list(got.weights) == names
    assert not got.warnings


def test_training_formats_keep_their_order() -> None:
    ckpt = checkpoint(["model.norm.weight", "model.embed_tokens.weight"], "deepspeed")
    assert in_model_order(ckpt) is ckpt


def test_unknown_names_are_said() -> None:
    ckpt = replace(checkpoint(["b.weird", "a.weight"]), warnings=("first",))
    got = in_model_order(ckpt)
    assert list(got.weights) == list(ckpt.weights)
    assert len(got.warnings) == 2
