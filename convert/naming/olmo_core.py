"""OLMo-core's names: OLMo 2 (norms behind attention and MLP), and Llama and Qwen3 built with it.

Its own config.json has the model under ``model``; rotary halves are Hugging Face's. Source:
OLMo-core ``nn/hf/convert.py`` and ``nn/transformer/config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World, rope_theta
from .table import Rule, rule

_L, _H = "blocks.{i}", "model.layers.{i}"


def _rules(first: str, second: str) -> tuple[Rule, ...]:
    """``first`` and ``second``: Hugging Face's names of the attention's and the MLP's norm."""
    lines = [
        rule("embeddings.weight", "model.embed_tokens.weight", "trim_vocab", "embedding"),
        rule("lm_head.norm.weight", "model.norm.weight", "same", "final norm"),
        rule("lm_head.w_out.weight", "lm_head.weight", "trim_vocab", "head"),
        rule(f"{_L}.attention_norm.weight", f"{_H}.{first}.weight", "same", "first norm"),
        rule(f"{_L}.feed_forward_norm.weight", f"{_H}.{second}.weight", "same", "second norm"),
    ]
    for left, right in (("w_q", "q"), ("w_k", "k"), ("w_v", "v"), ("w_out", "o")):
        source, target = f"{_L}.attention.{left}", f"{_H}.self_attn.{right}_proj"
        lines.append(rule(f"{source}.weight", f"{target}.weight", "same", right))
        lines.append(rule(f"{source}.bias", f"{target}.bias"))
    for norm in ("q_norm", "k_norm"):
        lines.append(rule(f"{_L}.attention.{norm}.weight", f"{_H}.self_attn.{norm}.weight"))
    for left, right in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        target = f"{_H}.mlp.{right}_proj.weight"
        lines.append(rule(f"{_L}.feed_forward.{left}.weight", target, "same", left))
    return tuple(lines)


_BEHIND = _rules("post_attention_layernorm", "post_feedforward_layernorm")
_BEFORE = _rules("input_layernorm", "post_attention_layernorm")
_VARIANTS = {
    "olmo2": Variant("Olmo2ForCausalLM", _BEHIND),
    "olmo3": Variant("Olmo3ForCausalLM", _BEHIND),
    "llama": Variant("LlamaForCausalLM", _BEFORE),
    "qwen3": Variant("Qwen3ForCausalLM", _BEFORE),
}


def _settings(ckpt: Checkpoint) -> Settings:
    """Return config.json of OLMo-core's ``model`` section; only plain OLMo 2 and Llama blocks."""
    model = (ckpt.config or {}).get("model")
    block = model.get("block") if isinstance(model, Mapping) else None
    attention = block.get("attention") if isinstance(block, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(block, Mapping):
        return {}
    if not isinstance(attention, Mapping) or model.get("block_overrides"):
        return {}
    behind = str(block.get("name")) == "reordered_norm"
    rope, norm = attention.get("rope") or {}, block.get("layer_norm") or {}
    if attention.get("sliding_window") or rope.get("scaling"):
        return {}
    config: dict[str, Any] = {
        "model_type": "olmo2" if behind else "llama",
        "hidden_size": model.get("d_model"),
        "intermediate_size": (block.get("feed_forward") or {}).get("hidden_size"),
        "num_hidden_layers": model.get("n_layers"),
        "num_attention_heads": attention.get("n_heads"),
        "num_key_value_heads": attention.get("n_kv_heads") or attention.get("n_heads"),
        "hidden_act": "silu",
        "rms_norm_eps": norm.get("eps", 1e-6),
        "rope_theta": float(rope.get("theta", 500000)),
    }
    return config


def _foreign(config: Settings) -> Settings:
    return {
        "model": {
            "d_model": config["hidden_size"],
            "n_layers": config["num_hidden_layers"],
            "vocab_size": config["vocab_size"],
            "rope_theta": rope_theta(config),
        }
    }


NAMING = World("olmo_core", "OLMo-core", lambda ckpt: _VARIANTS, _settings, _foreign).naming
