"""Megatron-LM's names: which table, sizes and config.json belong to a checkpoint, and back.

The family is recognised by its tensors, the numbers come from the saved args (traps: without
grouped-query attention ``num_query_groups`` is a meaningless default; ``vocab_size`` is mostly not
saved, ``padded_vocab_size`` depends on the TP of the run). Source: ``megatron/training/
arguments.py`` and the Megatron-Bridge model providers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import ConfigError, did_you_mean
from ...shardio.checkpoint import Checkpoint, Tensors
from ._megatron_args import megatron_args, saved_args
from ._megatron_families import FAMILIES, Family
from ._numbers import check_structure, count, experts_of, sizes_of
from .record import Model, Naming, Request
from .table import Table

_EMBEDDING = "embedding.word_embeddings.weight"
_REFUSED = {
    "attention_output_gate": "gated attention",
    "moe_mlp_glu_interleave_size": "interleaved gate and up rows",
}


def describe(ckpt: Checkpoint, request: Request) -> Model:
    """Return the model of a checkpoint with Megatron names.

    Raises:
        ConfigError: an unknown family, no args and no config, a vocabulary of unknown size.
    """
    args = _normal(ckpt.args)
    for key, what in _REFUSED.items():
        if args.get(key):
            raise ConfigError(f"{ckpt.path}: {what} (args.{key}) cannot be translated")
    family = _family(ckpt, request)
    derived = _config(family, args, ckpt.weights) if args else {}
    if ckpt.config is not None:
        check_structure(ckpt, derived)
        config = dict(ckpt.config)
    elif derived:
        config = derived
    else:
        raise ConfigError(
            f"{ckpt.path}: carries no Megatron args, so the model's shape is unknown; give the "
            "Hugging Face config.json of the model with --config"
        )
    padded, size, warnings = _vocabulary(ckpt, request, config, args)
    config["vocab_size"] = size
    config["tie_word_embeddings"] = tied = "output_layer.weight" not in ckpt.weights
    if request.model_type is not None and config.get("model_type") != request.model_type:
        config |= {"model_type": family.model_type, "architectures": [family.architecture]}
    sizes = replace(
        sizes_of(config, tied, padded), experts=_experts(ckpt.weights), **_stored_as(args)
    )
    table = Table(family.model_type, family.rules)
    return Model(table, sizes, config, args, left_out=("mtp.",), warnings=warnings)


def plan(ckpt: Checkpoint, request: Request) -> Model:
    """Return the Megatron model to be made of a checkpoint with Hugging Face names.

    Raises:
        ConfigError: no config, or a model type without a table.
    """
    if ckpt.config is None:
        raise ConfigError(f"{ckpt.path}: has no config.json; give one with --config")
    config = dict(ckpt.config)
    family = _by_type(str(request.model_type or config.get("model_type")))
    tied = "lm_head.weight" not in ckpt.weights
    padded = request.padded_vocab_size or count(config, "vocab_size")
    sizes = replace(
        sizes_of(config, tied, padded), experts=experts_of(config), **_stored_as(saved_args(ckpt))
    )
    args = megatron_args(ckpt, config, family, sizes)
    return Model(Table(family.model_type, family.rules), sizes, config, args)


def _stored_as(args: Mapping[str, Any]) -> dict[str, bool]:
    """Choices of the run that change the stored values."""
    return {
        "zero_centered_norm": bool(
            args.get("layernorm_zero_centered_gamma") or args.get("apply_layernorm_1p")
        ),
        "rotary_interleaved": bool(args.get("rotary_interleaved")),
    }


# -- family --------------------------------------------------------------------------------------


def _by_type(name: str) -> Family:
    for family in FAMILIES:
        if family.model_type == name:
            return family
    known = [f.model_type for f in FAMILIES]
    raise ConfigError(
        f"model type {name!r} has no Megatron naming{did_you_mean(name, known)}; known: "
        f"{', '.join(known)}"
    )


def _family(ckpt: Checkpoint, request: Request) -> Family:
    if request.model_type is not None:
        return _by_type(request.model_type)
    if ckpt.config is not None and ckpt.config.get("model_type"):
        return _by_type(str(ckpt.config["model_type"]))
    traits = _traits(ckpt.weights)
    for family in FAMILIES:
        if all(traits.get(trait) == value for trait, value in family.traits.items()):
            return family
    seen = ", ".join(f"{k}: {v}" for k, v in traits.items())
    raise ConfigError(
        f"{ckpt.path}: cannot tell the kind of model ({seen}); give a config.json (--config) "
        f"whose model_type is one of {', '.join(f.model_type for f in FAMILIES)}"
    )


def _traits(weights: Tensors) -> dict[str, bool]:
    """What distinguishes the families, as far as the tensors show it."""

    def any_(part: str) -> bool:
        return any(part in name for name in weights)

    shapes = [
        (t.shape[0], weights[other].shape[1])
        for name, t in weights.items()
        if name.endswith("linear_fc1.weight")
        and (other := name.replace("linear_fc1", "linear_fc2")) in weights
    ]
    return {
        "never": False,
        "gated": any(rows == 2 * inner for rows, inner in shapes),
        "learned positions": any_("embedding.position_embeddings"),
        "norm bias": any_(".input_layernorm.bias"),
        "QKV bias": any_("linear_qkv.bias"),
        "other biases": any_("linear_proj.bias") or any_("linear_fc1.bias"),
        "query norm": any_("self_attention.q_layernorm") and not any_("linear_kv_down_proj"),
        "latent attention": any_("linear_kv_down_proj"),
        "experts": any_(".mlp.router.weight"),
        "router bias": any_(".mlp.router.expert_bias"),
        "shared experts": any_(".shared_experts."),
        "shared expert gate": any_(".shared_experts.gate_weight"),
    }


# -- numbers -------------------------------------------------------------------------------------


def _normal(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the args with what old or default entries mean written out."""
    found = dict(args)
    heads = found.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        return {}
    if not found.get("group_query_attention") or not found.get("num_query_groups"):
        found["num_query_groups"] = heads
    hidden = found.get("hidden_size")
    if not found.get("kv_channels") and isinstance(hidden, int):
        found["kv_channels"] = hidden // heads
    if not found.get("ffn_hidden_size") and isinstance(hidden, int):
        found["ffn_hidden_size"] = 4 * hidden
    return found


def _config(family: Family, args: Mapping[str, Any], weights: Tensors) -> dict[str, Any]:
    """Derive config.json from the args (the vocabulary is filled in later)."""
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.config,
    }
    for key, names in family.keys:
        values = (args.get(name) for name in names.split("|"))
        value = next((v for v in values if v is not None), None)
        if value is not None:
            config[key] = value
    config["torch_dtype"] = weights[_EMBEDDING].dtype.name if _EMBEDDING in weights else None
    if family.model_type == "gpt2":
        # Megatron's fused kernel is the tanh form, its plain gelu the exact one
        config["activation_function"] = "gelu_new" if args.get("bias_gelu_fusion") else "gelu"
        return config | {"n_ctx": config.get("n_positions")}
    if family.model_type == "llama":
        config["attention_bias"] = any(n.endswith("linear_proj.bias") for n in weights)
        config["mlp_bias"] = any(n.endswith("linear_fc1.bias") for n in weights)
    config |= _rope(args)
    if args.get("moe_router_topk") and "experts" in " ".join(weights):
        config |= _mixture(family, args, weights)
    return config


def _rope(args: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings beyond the base."""
    out: dict[str, Any] = {}
    percent = args.get("rotary_percent")
    if isinstance(percent, int | float) and percent != 1:
        out["partial_rotary_factor"] = percent
    factor = args.get("rotary_seq_len_interpolation_factor")
    if args.get("use_rope_scaling"):
        out["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": args.get("rope_scaling_factor") or 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    elif isinstance(factor, int | float) and factor != 1:
        out["rope_scaling"] = {"rope_type": "linear", "factor": float(factor)}
    scale = args.get("rotary_scaling_factor")
    if args.get("multi_latent_attention") and isinstance(scale, int | float) and scale != 1:
        out["rope_scaling"] = {"rope_type": "yarn", "type": "yarn", "factor": float(scale)}
        for key in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow"):
            if args.get(key) is not None:
                out["rope_scaling"][key] = args[key]
        original = args.get("original_max_position_embeddings")
        out["rope_scaling"]["original_max_position_embeddings"] = original or 4096
    return out


def _mixture(family: Family, args: Mapping[str, Any], weights: Tensors) -> dict[str, Any]:
    """Settings of mixture-of-experts models that are no plain copy of an arg."""
    layers = range(count(args, "num_layers"))
    dense = [i for i in layers if f"decoder.layers.{i}.mlp.router.weight" not in weights]
    if family.model_type.startswith("deepseek"):
        if dense != list(range(len(dense))):
            raise ConfigError(
                f"layers {dense} are dense: {family.model_type} has only the first so"
            )
        shared = args.get("moe_shared_expert_intermediate_size")
        inner = count(args, "moe_ffn_hidden_size", "ffn_hidden_size")
        blocks = shared // inner if isinstance(shared, int) else None
        return {"first_k_dense_replace": len(dense), "n_shared_experts": blocks}
    if family.model_type == "mixtral":
        return {}
    # softmax over the chosen experts alone equals normalised probabilities of all
    return {"mlp_only_layers": dense, "norm_topk_prob": not args.get("moe_router_pre_softmax")}


def _vocabulary(
    ckpt: Checkpoint, request: Request, config: Mapping[str, Any], args: Mapping[str, Any]
) -> tuple[int, int, tuple[str, ...]]:
    """Return (padded size, true size, warnings).

    Raises ConfigError when the true size is unknown.
    """
    if _EMBEDDING not in ckpt.weights:
        raise ConfigError(f"{ckpt.path}: has no {_EMBEDDING}: not a language model, or incomplete")
    padded = ckpt.weights[_EMBEDDING].shape[0]
    size = request.vocab_size or config.get("vocab_size")
    multiple = args.get("make_vocab_size_divisible_by")
    unit = (multiple if isinstance(multiple, int) and multiple > 0 else 128) * ckpt.layout.tp
    if not isinstance(size, int) or size < 1:
        saved = args.get("vocab_size")
        hint = f" (its args mention {saved})" if isinstance(saved, int) else ""
        known = isinstance(multiple, int) and padded % unit == 0
        how = f"padded to a multiple of {unit}" if known else "which may be padded"
        raise ConfigError(
            f"{ckpt.path}: the embedding has {padded} rows, {how}; the true vocabulary size is "
            f"not in the checkpoint{hint}. Say it with --vocab-size N, or give --config or "
            f"--tokenizer; --vocab-size {padded} keeps all rows"
        )
    if size > padded:
        raise ConfigError(
            f"{ckpt.path}: the embedding has {padded} rows, fewer than the vocabulary size {size}: "
            "the config or tokenizer belongs to another model"
        )
    usual = -(-size // unit) * unit
    if padded in (size, usual) or not args:
        return padded, size, ()
    warning = (
        f"the embedding has {padded} rows, but a vocabulary of {size} would have been padded to "
        f"{usual}: check that the vocabulary size is right"
    )
    return padded, size, (warning,)


def _experts(weights: Tensors) -> int:
    routers = [t.shape[0] for name, t in weights.items() if name.endswith("mlp.router.weight")]
    return max(routers, default=0)


NAMING = Naming("megatron", "Megatron-LM", describe, plan)
