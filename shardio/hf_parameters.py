"""The parameters of plain decoder models of transformers, in the order in which they are defined.

Flat FSDP vectors are that order and nothing else. Source: transformers ``modeling_llama.py``,
``modeling_mistral.py``, ``modeling_qwen2.py``, ``modeling_qwen3.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_NUMBERS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


def parameters_of(config: Mapping[str, Any]) -> Shapes:
    """Return {name: shape} in order; empty for other model types or incomplete configs."""
    if config.get("model_type") not in _TYPES:
        return {}
    if not all(type(config.get(k)) is int and config[k] > 0 for k in _NUMBERS):
        return {}
    dim, layers = config["hidden_size"], config["num_hidden_layers"]
    found: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], dim)}
    for i in range(layers):
        for name, shape in _layer(config).items():
            found[f"model.layers.{i}.{name}"] = shape
    found["model.norm.weight"] = (dim,)
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (config["vocab_size"], dim)
    return found


def _layer(config: Mapping[str, Any]) -> Shapes:
    kind, dim, width = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    d = config.get("head_dim") or dim // heads
    q, kv = heads * d, (config.get("num_key_value_heads") or heads) * d
    bias = bool(config.get("attention_bias", kind == "qwen2"))
    out: Shapes = {}
    for name, rows, columns in (("q", q, dim), ("k", kv, dim), ("v", kv, dim), ("o", dim, q)):
        out[f"self_attn.{name}_proj.weight"] = (rows, columns)
        if bias and not (kind == "qwen2" and name == "o"):
            out[f"self_attn.{name}_proj.bias"] = (rows,)
    if kind == "qwen3":
        out |= {f"self_attn.{x}_norm.weight": (d,) for x in "qk"}
    for name, shape in (("gate", (width, dim)), ("up", (width, dim)), ("down", (dim, width))):
        out[f"mlp.{name}_proj.weight"] = shape
        if config.get("mlp_bias"):
            out[f"mlp.{name}_proj.bias"] = shape[:1]
    return out | {"input_layernorm.weight": (dim,), "post_attention_layernorm.weight": (dim,)}
