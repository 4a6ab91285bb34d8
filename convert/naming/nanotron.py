"""nanotron's names for Llama and Qwen2 models: fused [q | k | v] and [gate | up].

Settings are ``model_config.json``; with ``rope_interleaved`` q and k have rotary pairs in adjacent
rows. Source: nanotron ``models/{llama,qwen}.py`` and ``examples/llama/convert_weights.py``.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World, rope_theta
from .table import Rule, rule

_L, _H = "model.decoder.{i}.pp_block", "model.layers.{i}"
_COPIED = (
    "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_scaling", "rope_theta",
    "vocab_size",
)  # fmt: skip
_REFUSED = ("moe_config", "no_rope_layer", "rope_seq_len_interpolation_factor")


def _rules() -> tuple[Rule, ...]:
    outer = (
        ("token_position_embeddings.pp_block.token_embedding", "model.embed_tokens", "embedding"),
        ("final_layer_norm.pp_block", "model.norm", "final norm"),
        ("lm_head.pp_block", "lm_head", "head"),
    )
    lines = [
        rule(f"model.{left}.weight", f"{right}.weight", _vocabulary(need), need)
        for left, right, need in outer
    ]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        lines.append(rule(f"{_L}.{norm}.weight", f"{_H}.{norm}.weight", "same", norm))
    for kind in ("weight", "bias"):
        need = kind == "weight"
        qkv = [f"{_H}.self_attn.{x}_proj.{kind}" for x in "qkv"]
        gate_up = [f"{_H}.mlp.{x}_proj.{kind}" for x in ("gate", "up")]
        lines += [
            Rule((f"{_L}.attn.qkv_proj.{kind}",), tuple(qkv), "split_qkv_blocks", "qkv" * need),
            Rule((f"{_L}.mlp.gate_up_proj.{kind}",), tuple(gate_up), "split_gate_up", "up" * need),
            rule(f"{_L}.attn.o_proj.{kind}", f"{_H}.self_attn.o_proj.{kind}", "same", "o" * need),
            rule(f"{_L}.mlp.down_proj.{kind}", f"{_H}.mlp.down_proj.{kind}", "same", "down" * need),
        ]
    return tuple(lines)


def _vocabulary(need: str) -> str:
    return "same" if need == "final norm" else "trim_vocab"


_VARIANTS = {
    "llama": Variant("LlamaForCausalLM", _rules()),
    "qwen2": Variant("Qwen2ForCausalLM", _rules()),
}


def _settings(ckpt: Checkpoint) -> Settings:
    args = ckpt.args
    for key in _REFUSED:
        if args.get(key):
            raise ConfigError(f"{ckpt.path}: models with {key} cannot be translated")
    if "hidden_size" not in args:
        return {}
    config: dict[str, Any] = {k: args[k] for k in _COPIED if k in args}
    biased = any(n.endswith("attn.qkv_proj.bias") for n in ckpt.weights)
    config["model_type"] = "qwen2" if biased else "llama"
    if not config.get("num_key_value_heads"):
        config["num_key_value_heads"] = config.get("num_attention_heads")
    return config


def _foreign(config: Settings) -> Settings:
    args = {k: config[k] for k in _COPIED if k in config} | {"rope_theta": rope_theta(config)}
    kind = "is_qwen2_config" if config.get("model_type") == "qwen2" else "is_llama_config"
    return args | {kind: True, "rope_interleaved": False}


NAMING = World(
    "nanotron",
    "nanotron",
    lambda ckpt: _VARIANTS,
    _settings,
    _foreign,
    rotary_pairs=lambda ckpt: bool(ckpt.args.get("rope_interleaved")) and ckpt.naming != "hf",
).naming
