"""GGUF's names, back to Hugging Face's: by the architecture's own table where it can be undone.

The table here serves Llama-like models that come with a config.json of their own: llama.cpp's
``llama`` models keep rotary pairs in adjacent rows of q and k, the others halves. Settings are the
file's metadata. Source: gguf-py ``constants.py``, llama.cpp's converter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World, rope_theta
from .record import Request
from .table import Rule, rule

_L, _H = "blk.{i}", "model.layers.{i}"
_ATTENTION = (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"),
              ("attn_output", "o_proj"))  # fmt: skip
_MLP = (
    ("ffn_gate", "gate_proj", "w1"),
    ("ffn_up", "up_proj", "w3"),
    ("ffn_down", "down_proj", "w2"),
)
_TYPES = {"llama": "llama", "mistral3": "mistral", "qwen2": "qwen2", "qwen3": "qwen3",
          "qwen3moe": "qwen3_moe"}  # fmt: skip
_SCALED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def _rules(*, pairs: bool, experts: str = "") -> tuple[Rule, ...]:
    """``experts``: the module of a mixture of experts, with the names of its parts."""
    lines = [
        rule("token_embd.weight", "model.embed_tokens.weight", "trim_vocab", "embedding"),
        rule("output_norm.weight", "model.norm.weight", "same", "final norm"),
        rule("output.weight", "lm_head.weight", "trim_vocab", "head"),
        rule(f"{_L}.attn_norm.weight", f"{_H}.input_layernorm.weight", "same", "first norm"),
        rule(f"{_L}.ffn_norm.weight", f"{_H}.post_attention_layernorm.weight", "same", "second"),
    ]
    for left, right in _ATTENTION:
        how = f"deinterleave_{right[0]}" if pairs and right[0] in "qk" else "same"
        target = f"{_H}.self_attn.{right}"
        lines.append(rule(f"{_L}.{left}.weight", f"{target}.weight", how, left))
        lines.append(rule(f"{_L}.{left}.bias", f"{target}.bias", how))
    for x in "qk":
        lines.append(rule(f"{_L}.attn_{x}_norm.weight", f"{_H}.self_attn.{x}_norm.weight"))
    if not experts:
        lines += [rule(f"{_L}.{a}.weight", f"{_H}.mlp.{b}.weight", "same", a) for a, b, _ in _MLP]
        return tuple(lines)
    place = f"{_H}.{experts}"
    lines.append(rule(f"{_L}.ffn_gate_inp.weight", f"{place}.gate.weight", "same", "router"))
    for left, name, short in _MLP:
        part = short if experts == "block_sparse_moe" else name
        target = f"{place}.experts.{{e}}.{part}.weight"
        lines.append(rule(f"{_L}.{left}_exps.weight", target, "unstack_experts", left))
    return tuple(lines)


_VARIANTS = {
    "llama": Variant("LlamaForCausalLM", _rules(pairs=True)),
    "mistral": Variant("MistralForCausalLM", _rules(pairs=True)),
    "mixtral": Variant("MixtralForCausalLM", _rules(pairs=True, experts="block_sparse_moe")),
    "qwen2": Variant("Qwen2ForCausalLM", _rules(pairs=False)),
    "qwen3": Variant("Qwen3ForCausalLM", _rules(pairs=False)),
    "qwen3_moe": Variant("Qwen3MoeForCausalLM", _rules(pairs=False, experts="mlp")),
}


def _settings(ckpt: Checkpoint) -> Settings:
    """Return config.json of the metadata."""
    args = ckpt.args
    kind = str(args.get("general.architecture"))

    def of(key: str) -> Any:
        return args.get(f"{kind}.{key}")

    if kind not in _TYPES or of("embedding_length") is None:
        return {}
    experts = of("expert_count")
    width = of("expert_feed_forward_length") if kind == "qwen3moe" else of("feed_forward_length")
    config: dict[str, Any] = {
        "model_type": "mixtral" if experts and kind == "llama" else _TYPES[kind],
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length") or width,
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv") or of("attention.head_count"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_theta": of("rope.freq_base") or 10000.0,
        "hidden_act": "silu",
    }
    if of("attention.key_length"):
        config["head_dim"] = of("attention.key_length")
    if experts:
        key = "num_experts" if kind == "qwen3moe" else "num_local_experts"
        config |= {key: experts, "num_experts_per_tok": of("expert_used_count")}
        if kind == "qwen3moe":
            config["moe_intermediate_size"] = width
    scaling, factor = of("rope.scaling.type"), of("rope.scaling.factor")
    if scaling in ("linear", "yarn") and factor:
        config["rope_scaling"] = {"rope_type": scaling, "factor": factor}
        original = of("rope.scaling.original_context_length")
        if original:
            config["rope_scaling"]["original_max_position_embeddings"] = original
    return config


def _notes(ckpt: Checkpoint) -> tuple[str, ...]:
    if any(n in ckpt.weights for n in _SCALED) and ckpt.config is None:
        return (
            "rotary factors (rope_freqs) are in the file, but not the settings they came from: "
            "give the model's config.json with --config",
        )
    return ()


def _foreign(config: Settings) -> Settings:
    return {"general.architecture": config.get("model_type"), "rope_theta": rope_theta(config)}


def _restore(ckpt: Checkpoint, request: Request) -> Checkpoint | None:
    """Bring a file's weights back by the table of its architecture, where one can be undone."""
    from ..architectures import architectures
    from ..from_gguf_model import find_model
    from ..from_gguf_tensors import PLAIN_FLOATS
    from ..gguf import open_gguf

    kind, given = ckpt.args.get("general.architecture"), ckpt.config
    known = any(r.restore is not None and r.name == kind for r in architectures().values())
    if not known or request.model_type or (given or {}).get("model_type") in _VARIANTS:
        return None
    file = open_gguf(ckpt.path)
    plain = all(info.type.name in PLAIN_FLOATS for info in file.tensors.values())
    model = find_model(file, None if plain else np.dtype(np.float32), given)
    if request.vocab_size not in (None, model.config["vocab_size"]):
        return None
    return replace(ckpt, naming="hf", weights=model.restored.weights, config=model.config)


NAMING = replace(
    World(
        "gguf",
        "GGUF",
        lambda ckpt: _VARIANTS,
        _settings,
        _foreign,
        buffers=_SCALED,
        notes=_notes,
    ).naming,
    restore=_restore,
)
