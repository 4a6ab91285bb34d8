"""Random small models of real families with Hugging Face names, for targets with other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mconv.shardio import Checkpoint, from_array
from mconv.shardio.dtypes import parse

from .models import SETTINGS

HEAD_DIM = 4


def family(
    kind: str,
    seed: int = 0,
    *,
    dtype: str = "bfloat16",
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 2,
    vocab: int = 40,
    optimizer: bool = True,
    tied: bool = False,
    theta: float = 500000.0,
) -> Checkpoint:
    """A model with optimizer states in memory, weights in the order of the model.

    ``kind`` is llama, qwen2 (biases), qwen3 (query and key norms) or mixtral (four experts).
    """
    hidden, width = heads * HEAD_DIM, 24
    config: dict[str, Any] = {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5,
        "rope_theta": theta, "vocab_size": vocab, "max_position_embeddings": 64,
        "hidden_act": "silu", "tie_word_embeddings": tied, "attention_bias": False,
    }  # fmt: skip
    if kind == "mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    shapes = _shapes(kind, config)
    if tied:
        del shapes["lm_head.weight"]
    rng = np.random.default_rng(seed)
    masters = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    states: dict[str, Any] = {}
    if optimizer:
        if dtype != "float32":
            states["master"] = {n: from_array(x) for n, x in masters.items()}
        for state in ("exp_avg", "exp_avg_sq"):
            states[state] = {
                n: from_array(rng.random(s).astype(np.float32)) for n, s in shapes.items()
            }
    wide = [n for n, s in shapes.items() if len(s) > 1]
    plain = [n for n, s in shapes.items() if len(s) == 1]
    groups = [{**SETTINGS, "params": wide}, {**SETTINGS, "weight_decay": 0.0, "params": plain}]
    return Checkpoint(
        path=Path("memory"),
        format="torch_save",
        weights={n: from_array(x.astype(parse(dtype))) for n, x in masters.items()},
        optimizer=states,
        step=7 if optimizer else None,
        args={"training_dtype": dtype} if dtype != "float32" else {},
        scalars={"param_groups": groups} if optimizer else {},
        tied={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        config=config,
    )


def _shapes(kind: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, w = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[k] * HEAD_DIM for k in ("num_attention_heads", "num_key_value_heads"))
    vocab = (config["vocab_size"], h)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocab}
    for i in range(config["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {}
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            layer[f"self_attn.{name}_proj.weight"] = (rows, h)
            if kind == "qwen2":
                layer[f"self_attn.{name}_proj.bias"] = (rows,)
        layer["self_attn.o_proj.weight"] = (h, q)
        if kind == "qwen3":
            layer |= {f"self_attn.{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
        if kind == "mixtral":
            layer["block_sparse_moe.gate.weight"] = (config["num_local_experts"], h)
            for e in range(config["num_local_experts"]):
                for m, shape in (("w1", (w, h)), ("w2", (h, w)), ("w3", (w, h))):
                    layer[f"block_sparse_moe.experts.{e}.{m}.weight"] = shape
        else:
            for m, shape in (("gate", (w, h)), ("up", (w, h)), ("down", (h, w))):
                layer[f"mlp.{m}_proj.weight"] = shape
        layer["input_layernorm.weight"] = layer["post_attention_layernorm.weight"] = (h,)
        found |= {f"model.layers.{i}.{n}": s for n, s in layer.items()}
    return found | {"model.norm.weight": (h,), "lm_head.weight": vocab}
