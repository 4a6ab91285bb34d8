"""AutoEP's names of a Qwen3-MoE.

``tests/e2e/test_autoep.py`` reads a Mixtral that DeepSpeed wrote.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mconv.convert.naming import from_hf, to_hf
from mconv.errors import ConfigError
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.tensor import from_array

CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_experts": 2,
}  # fmt: skip
SAME = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_norm.weight")


def checkpoint() -> Checkpoint:
    names = [*SAME, "model.layers.0.mlp.router.gate.weight"]
    names += [f"model.layers.0.mlp.experts.w{k}.{e}" for k in (1, 2, 3) for e in (0, 1)]
    weights = {n: from_array(np.full((5, 4), k, np.float32)) for k, n in enumerate(names)}
    tied = {"model.layers.0.mlp.gate.gate.weight": "model.layers.0.mlp.router.gate.weight"}
    return Checkpoint(
        path=Path("x"),
        format="deepspeed",
        weights=weights,
        naming="autoep",
        config=CONFIG,
        tied=tied,
    )


def test_qwen3_moe() -> None:
    ckpt = checkpoint()
    named = to_hf(ckpt)
    at = "model.layers.0.mlp"
    old = {f"{at}.gate.weight": f"{at}.router.gate.weight", **{n: n for n in SAME}}
    for k, proj in ((1, "gate_proj"), (2, "down_proj"), (3, "up_proj")):
        for e in (0, 1):
            old[f"{at}.experts.{e}.{proj}.weight"] = f"{at}.experts.w{k}.{e}"
    assert named.weights.keys() == old.keys()
    for name, tensor in named.weights.items():
        assert np.array_equal(tensor.read(), ckpt.weights[old[name]].read()), name
    assert named.tied == {}
    assert named.config is not None
    assert named.config["architectures"] == ["Qwen3MoeForCausalLM"]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"bloom.*no AutoEP naming"):
        to_hf(checkpoint(), model_type="bloom")
    with pytest.raises(ConfigError, match="not written"):
        from_hf(to_hf(checkpoint()), "autoep")
