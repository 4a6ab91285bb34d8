"""LitGPT old and new, torchtune and OLMo-core: names by each code's own conventions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.naming import from_hf, to_hf
from mconv.errors import ConfigError
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.tensor import from_array
from mconv.shardio.worlds import world_of

HEADS, KV, DIM, D, WIDTH = 4, 2, 32, 8, 48
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": DIM, "num_hidden_layers": 2, "head_dim": D,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "intermediate_size": WIDTH,
    "vocab_size": 40,
}  # fmt: skip

Arrays = dict[str, np.ndarray]


def _hf_model(norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")) -> Arrays:
    rng = np.random.default_rng(3)
    layer = {"self_attn.q_proj": (HEADS * D, DIM), "self_attn.k_proj": (KV * D, DIM),
             "self_attn.v_proj": (KV * D, DIM), "self_attn.o_proj": (DIM, HEADS * D),
             norms[0]: (DIM,), norms[1]: (DIM,), "mlp.gate_proj": (WIDTH, DIM),
             "mlp.up_proj": (WIDTH, DIM), "mlp.down_proj": (DIM, WIDTH)}  # fmt: skip
    shapes = {"model.embed_tokens.weight": (40, DIM), "model.norm.weight": (DIM,)}
    shapes |= {f"model.layers.{i}.{n}.weight": s for i in range(2) for n, s in layer.items()}
    shapes["lm_head.weight"] = (40, DIM)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def _litgpt(m: Arrays, *, old: bool) -> Arrays:
    out = {"transformer.wte.weight": np.pad(m["model.embed_tokens.weight"], ((0, 8), (0, 0))),
           "transformer.ln_f.weight": m["model.norm.weight"],
           "lm_head.weight": np.pad(m["lm_head.weight"], ((0, 8), (0, 0)))}  # fmt: skip
    for i in range(2):
        h, t = f"model.layers.{i}", f"transformer.h.{i}"
        q, k, v = (m[f"{h}.self_attn.{x}_proj.weight"] for x in "qkv")
        groups = zip(np.split(q, KV), np.split(k, KV), np.split(v, KV), strict=True)
        fused = np.concatenate([x for g in groups for x in g] if old else [q, k, v])
        out[f"{t}.attn.{'attn' if old else 'qkv'}.weight"] = fused
        for left, right in (("attn.proj", "self_attn.o_proj"), ("norm_1", "input_layernorm"),
                            ("norm_2", "post_attention_layernorm"), ("mlp.fc_1", "mlp.gate_proj"),
                            ("mlp.fc_2", "mlp.up_proj"),
                            ("mlp.proj", "mlp.down_proj")):  # fmt: skip
            out[f"{t}.{left}.weight"] = m[f"{h}.{right}.weight"]
    return out


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, 2, D // 2, -1).transpose(0, 2, 1, 3).reshape(rows.shape)


def _torchtune(m: Arrays) -> Arrays:
    out = {"tok_embeddings.weight": m["model.embed_tokens.weight"],
           "norm.scale": m["model.norm.weight"], "output.weight": m["lm_head.weight"]}  # fmt: skip
    for i in range(2):
        h, t = f"model.layers.{i}", f"layers.{i}"
        out[f"{t}.attn.q_proj.weight"] = _permuted(m[f"{h}.self_attn.q_proj.weight"], HEADS)
        out[f"{t}.attn.k_proj.weight"] = _permuted(m[f"{h}.self_attn.k_proj.weight"], KV)
        for left, right in (("attn.v_proj.weight", "self_attn.v_proj"),
                            ("attn.output_proj.weight", "self_attn.o_proj"),
                            ("sa_norm.scale", "input_layernorm"),
                            ("mlp_norm.scale", "post_attention_layernorm"),
                            ("mlp.w1.weight", "mlp.gate_proj"), ("mlp.w2.weight", "mlp.down_proj"),
                            ("mlp.w3.weight", "mlp.up_proj")):  # fmt: skip
            out[f"{t}.{left}"] = m[f"{h}.{right}.weight"]
    return out


def _olmo(m: Arrays) -> Arrays:
    out = {"embeddings.weight": m["model.embed_tokens.weight"],
           "lm_head.norm.weight": m["model.norm.weight"],
           "lm_head.w_out.weight": m["lm_head.weight"]}  # fmt: skip
    names = (("attention.w_q", "self_attn.q_proj"), ("attention.w_k", "self_attn.k_proj"),
             ("attention.w_v", "self_attn.v_proj"), ("attention.w_out", "self_attn.o_proj"),
             ("attention_norm", "post_attention_layernorm"),
             ("feed_forward_norm", "post_feedforward_layernorm"),
             ("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w2", "mlp.down_proj"),
             ("feed_forward.w3", "mlp.up_proj"))  # fmt: skip
    for i in range(2):
        for left, right in names:
            out[f"blocks.{i}.{left}.weight"] = m[f"model.layers.{i}.{right}.weight"]
    return out


OLMO_CONFIG = {"model": {
    "d_model": DIM, "n_layers": 2, "vocab_size": 40,
    "block": {"name": "reordered_norm", "layer_norm": {"eps": 1e-6},
              "attention": {"n_heads": HEADS, "n_kv_heads": KV, "rope": {"theta": 500000}},
              "feed_forward": {"hidden_size": WIDTH}},
}}  # fmt: skip
PLAIN = _hf_model()
BEHIND = _hf_model(("post_attention_layernorm", "post_feedforward_layernorm"))
CASES: dict[str, tuple[str, Arrays, Callable[[Arrays], Arrays], dict[str, Any]]] = {
    "litgpt": ("litgpt", PLAIN, lambda m: _litgpt(m, old=False), CONFIG),
    "litgpt_old": ("litgpt", PLAIN, lambda m: _litgpt(m, old=True), CONFIG),
    "torchtune": ("torchtune", PLAIN, _torchtune, CONFIG),
    "olmo2": ("olmo_core", BEHIND, _olmo, OLMO_CONFIG),
}


def _checkpoint(weights: Arrays, config: dict[str, Any] | None, naming: str) -> Checkpoint:
    tensors = {n: from_array(a) for n, a in weights.items()}
    return Checkpoint(path=Path("x"), format="x", naming=naming, weights=tensors, config=config)


@pytest.mark.parametrize("case", CASES)
def test_to_hf(case: str) -> None:
    naming, model, write, config = CASES[case]
    foreign = write(model)
    assert world_of({n: from_array(a) for n, a in foreign.items()}) == naming
    made = to_hf(_checkpoint(foreign, config, naming), vocab_size=40)
    assert set(made.weights) == set(model)
    assert all(np.array_equal(t.read(), model[n]) for n, t in made.weights.items())
    assert made.config is not None
    for key in ("hidden_size", "num_key_value_heads", "intermediate_size"):
        assert made.config[key] == CONFIG[key]


@pytest.mark.parametrize("case", ["litgpt", "torchtune"])
def test_there_and_back(case: str) -> None:
    naming, model, _, config = CASES[case]
    hf = _checkpoint(model, config, "hf")
    again = to_hf(replace(from_hf(hf, naming), config=config))
    assert all(np.array_equal(t.read(), model[n]) for n, t in again.weights.items())


def test_olmo2_config_is_derived() -> None:
    made = to_hf(_checkpoint(_olmo(BEHIND), OLMO_CONFIG, "olmo_core"))
    assert made.config is not None
    assert (made.config["model_type"], made.config["rope_theta"]) == ("olmo2", 500000.0)


@pytest.mark.parametrize("case", ["litgpt", "torchtune"])
def test_settings_are_asked_for(case: str) -> None:
    naming, model, write, _ = CASES[case]
    with pytest.raises(ConfigError, match="--config"):
        to_hf(_checkpoint(write(model), None, naming))


def test_a_lost_layer_is_named() -> None:
    foreign = {n: a for n, a in _torchtune(PLAIN).items() if n != "layers.1.mlp.w3.weight"}
    with pytest.raises(ConfigError, match="w3 of layer 1"):
        to_hf(_checkpoint(foreign, CONFIG, "torchtune"))
