"""OLMo's first code (and OLMo 2 trained with it): ``transformer.blocks.N.att_proj``.

``att_proj`` is [q | k | v], ``ff_proj`` [up | gate]; OLMo 1 has norms without weights. Settings are
the ``model`` section of config.yaml beside the weights, or the flat config.json of ``hf_olmo``.
Source: OLMo ``olmo/model.py``, ``olmo/config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import ConfigError
from ...shardio.assets import around, load_yaml
from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World
from .record import Model, Naming, Request
from .table import Rule, rule

_H = "model.layers.{i}"
_KEY = "olmo"
_REFUSED = ("alibi", "embedding_layer_norm", "scale_logits")


def _rules(at: str, first: str, second: str) -> tuple[Rule, ...]:
    """``first`` and ``second``: Hugging Face's names of the attention's and the MLP's norm."""
    block = f"{at}blocks.{{i}}"
    lines = [
        rule(f"{at}wte.weight", "model.embed_tokens.weight", "trim_vocab", "embedding"),
        rule(f"{at}ln_f.weight", "model.norm.weight"),
        rule(f"{at}ff_out.weight", "lm_head.weight", "trim_vocab", "head"),
        rule(f"{block}.attn_norm.weight", f"{_H}.{first}.weight"),
        rule(f"{block}.ff_norm.weight", f"{_H}.{second}.weight"),
        rule(f"{block}.q_norm.weight", f"{_H}.self_attn.q_norm.weight"),
        rule(f"{block}.k_norm.weight", f"{_H}.self_attn.k_norm.weight"),
        rule(f"{block}.attn_out.weight", f"{_H}.self_attn.o_proj.weight", "same", "o"),
        rule(f"{block}.ff_out.weight", f"{_H}.mlp.down_proj.weight", "same", "down"),
    ]
    parts = tuple(f"{_H}.self_attn.{x}_proj.weight" for x in "qkv")
    lines.append(rule(f"{block}.att_proj.weight", parts, "split_qkv_blocks", "q|k|v"))
    both = tuple(f"{_H}.mlp.{x}_proj.weight" for x in ("up", "gate"))
    lines.append(rule(f"{block}.ff_proj.weight", both, "split_gate_up", "up and gate"))
    return tuple(lines)


def _variants(ckpt: Checkpoint) -> Mapping[str, Variant]:
    at = (
        "model.transformer."
        if any(n.startswith("model.transformer.") for n in ckpt.weights)
        else ""
    )
    at = at or "transformer."
    before = _rules(at, "input_layernorm", "post_attention_layernorm")
    behind = _rules(at, "post_attention_layernorm", "post_feedforward_layernorm")
    return {
        "olmo": Variant("OlmoForCausalLM", before),
        "olmo2": Variant("Olmo2ForCausalLM", behind),
    }


def _own(ckpt: Checkpoint) -> Mapping[str, Any]:
    """The code's own settings: flat in config.json, or a section of config.yaml."""
    config = ckpt.config or {}
    if "d_model" in config:
        return config
    for folder in around(ckpt.path, 1):
        path = folder / "config.yaml"
        if path.is_file():
            found = load_yaml(path, section="model")
            if isinstance(found, Mapping) and "d_model" in found:
                return found
    return {}


def _settings(ckpt: Checkpoint) -> Settings:
    """Return config.json.

    Raises:
        ConfigError: models that Hugging Face's OLMo cannot compute.
    """
    own = ckpt.args.get(_KEY)
    if not isinstance(own, Mapping) or not all(
        type(own.get(k)) is int for k in ("d_model", "n_heads", "n_layers")
    ):
        return {}
    _refuse_others(ckpt, own)
    heads = own["n_heads"]
    single = 1 if own.get("multi_query_attention") is True else heads
    config: dict[str, Any] = {
        "model_type": "olmo2" if own.get("norm_after") is True else "olmo",
        "hidden_size": own["d_model"],
        "intermediate_size": _width(ckpt),
        "num_hidden_layers": own["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("n_kv_heads") or single,
        "max_position_embeddings": own.get("max_sequence_length", 2048),
        "hidden_act": "silu",
        "rope_theta": float(own.get("rope_theta", 10000)),
    }
    if config["model_type"] == "olmo2":
        config["rms_norm_eps"] = own.get("layer_norm_eps", 1e-5)
    else:
        config["clip_qkv"] = own.get("clip_qkv")
    for key in ("pad_token_id", "eos_token_id"):
        if type(own.get(key)) is int:
            config[key] = own[key]
    return config


def _refuse_others(ckpt: Checkpoint, own: Mapping[str, Any]) -> None:
    behind = own.get("norm_after") is True
    problems = [f"{k} = {own[k]}" for k in _REFUSED if own.get(k)]
    if own.get("rope") is False:
        problems.append("positions that are not rotary")
    if str(own.get("activation_type", "swiglu")).lower() != "swiglu":
        problems.append(f"activation {own['activation_type']}")
    if own.get("block_type", "sequential") != "sequential" or own.get("block_group_size", 1) != 1:
        problems.append("another kind of block than sequential")
    if behind != (own.get("attention_layer_norm") is True) or (behind and own.get("clip_qkv")):
        problems.append("norms within the attention without norms behind it, or clip_qkv with both")
    if not behind and any(n.endswith(("norm.weight", "ln_f.weight")) for n in ckpt.weights):
        problems.append("norms with weights before attention and MLP")
    if problems:
        raise ConfigError(f"{ckpt.path}: no Hugging Face OLMo has {'; '.join(problems)}")


def _width(ckpt: Checkpoint) -> int | None:
    ends = "blocks.0.ff_out.weight"
    return next((t.shape[1] for n, t in ckpt.weights.items() if n.endswith(ends)), None)


def _foreign(config: Settings) -> Settings:
    return {
        _KEY: {
            "d_model": config["hidden_size"],
            "n_layers": config["num_hidden_layers"],
            "n_heads": config["num_attention_heads"],
            "norm_after": config.get("model_type") == "olmo2",
            "vocab_size": config["vocab_size"],
        }
    }


_WORLD = World("olmo", "OLMo", _variants, _settings, _foreign).naming


def _describe(ckpt: Checkpoint, request: Request) -> Model:
    """The own settings go where the common code looks for them; they are no config.json."""
    own = _own(ckpt)
    config = None if ckpt.config is not None and "d_model" in ckpt.config else ckpt.config
    return _WORLD.describe(replace(ckpt, config=config, args={**ckpt.args, _KEY: own}), request)


NAMING = Naming(_WORLD.name, _WORLD.title, _describe, _WORLD.plan)
