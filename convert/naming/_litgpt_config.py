"""LitGPT's ``model_config.yaml`` as a Hugging Face configuration.

The file lies beside every ``lit_model.pth`` and holds all fields of litgpt's ``Config``. A model
that Hugging Face's class would compute otherwise is refused by the field that says so. Source:
litgpt ``config.py`` and ``model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...shardio.assets import load_yaml
from ._numbers import count

FILE = "model_config.yaml"
_SAID = ("n_layer", "n_embd", "n_head")  # without these it is another tool's file
_ROPE, _LAYERS = "rope_adjustments", "sliding_window_indices"
#: What the supported families have in common: litgpt's fields and the only values they may have.
_ALWAYS: Mapping[str, tuple[Any, ...]] = {
    "lm_head_bias": (False,), "norm_1": (True,), "norm_2": (True,), "rope_interleave": (False,),
    "rope_local_base_freq": (None,), "latent_attention": (None,), "shared_attention_norm": (False,),
    "n_expert_groups": (None,), "n_shared_expert": (None, 0), "first_k_dense_replace": (None, 0),
    "routed_scaling_factor": (1,), "norm_qk_type": ("default",),
}  # fmt: skip
_LLAMA: Mapping[str, tuple[Any, ...]] = {
    "norm_class_name": ("RMSNorm",), "parallel_residual": (False,), "rotary_percentage": (1,),
    "post_attention_norm": (False,), "post_mlp_norm": (False,), "scale_embeddings": (False,),
    "attention_logit_softcapping": (None,), "final_logit_softcapping": (None,),
}  # fmt: skip
_NEOX: Mapping[str, tuple[Any, ...]] = {
    "norm_class_name": ("LayerNorm",), "bias": (True,), "norm_qk": (False,),
    "post_attention_norm": (False,), "post_mlp_norm": (False,), "scale_embeddings": (False,),
    "attention_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "sliding_window_size": (None,), "rope_condense_ratio": (1,), "rope_adjustments": (None,),
}  # fmt: skip
_GEMMA2: Mapping[str, tuple[Any, ...]] = {
    "norm_class_name": ("RMSNorm",), "parallel_residual": (False,), "rotary_percentage": (1,),
    "post_attention_norm": (True,), "post_mlp_norm": (True,), "scale_embeddings": (True,),
    "norm_qk": (False,), "bias": (False,), "attn_bias": (False,), "rope_condense_ratio": (1,),
    "rope_adjustments": (None,),
}  # fmt: skip
_PHI3: Mapping[str, tuple[Any, ...]] = {
    **_LLAMA, "rotary_percentage": (1, 0.75), "norm_qk": (False,), "bias": (False,),
    "attn_bias": (False,), "rope_condense_ratio": (1,), "rope_adjustments": (None,),
}  # fmt: skip
# litgpt's defaults, for files whose author left fields out
_DEFAULTS: Mapping[str, Any] = {
    "name": "", "block_size": 4096, "n_layer": 16, "n_embd": 4096, "n_head": 32,
    "norm_class_name": "LayerNorm", "norm_eps": 1e-5, "norm_qk": False, "norm_qk_type": "default",
    "post_attention_norm": False, "post_mlp_norm": False, "parallel_residual": True,
    "shared_attention_norm": False, "attn_bias": False, "rope_base": 10000,
    "rotary_percentage": 0.25, "rope_condense_ratio": 1, "rope_interleave": False, "bias": True,
    "mlp_class_name": "GptNeoxMLP", "gelu_approximate": "none", "n_expert": 0,
    "n_expert_per_token": 0, "routed_scaling_factor": 1.0, "scale_embeddings": False,
    "lm_head_bias": False, "norm_1": True, "norm_2": True,
}  # fmt: skip
_GELU = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")


def read_config(path: Path) -> dict[str, Any]:
    """Translate a file.

    Args:
        path: of ``model_config.yaml``.

    Returns:
        config.json entries with ``model_type``, but not the vocabulary: its rows are all kept.

    Raises:
        ConfigError: no settings of litgpt, or of a model that no supported family computes.
    """
    found = load_yaml(path)
    if not isinstance(found, Mapping) or any(key not in found for key in _SAID):
        raise ConfigError(f"{path}: expected the settings of a LitGPT model, by name")
    try:
        own = {k: _plain(k, v) for k, v in found.items() if isinstance(k, str)}
        return _translated({**_DEFAULTS, **own})
    except ConfigError as error:
        hint = "give the Hugging Face config.json of the model with --config"
        raise ConfigError(f"{path}: {error}; {hint}") from error


def _plain(key: str, value: Any) -> Any:
    """Return a value that is safe to compare and to show: YAML's may hold each other."""
    if isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{key[:40]} is a number of {value.bit_length()} bits")
    if value is None or isinstance(value, int | float | str):
        return value
    if key == _ROPE and isinstance(value, Mapping):
        return {str(k): _plain("", v) for k, v in value.items() if isinstance(k, str)}
    if key == _LAYERS and isinstance(value, list):
        return [_plain("", v) for v in value]
    return f"a {type(value).__name__}"


def _translated(own: Mapping[str, Any]) -> dict[str, Any]:
    _check(own, _ALWAYS)
    kind = own["mlp_class_name"]
    name = str(own["name"])
    if kind == "GptNeoxMLP":
        return _neox(own)
    if kind == "GemmaMLP":
        return _gemma2(own, name)
    if kind == "LLaMAMoE":
        return _experts(own, name)
    if kind == "LLaMAMLP":
        return _phi3(own) if name.lower().startswith(("phi-3", "phi-4")) else _dense(own, name)
    raise ConfigError(f"mlp_class_name is {str(kind)[:40]!r}, which no supported family has")


def _check(own: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in wanted.items():
        if own.get(key) not in values:
            said = " or ".join(map(repr, values))
            raise ConfigError(
                f"{key} is {str(own.get(key))[:40]!r}: a model like this is supported with {said}"
            )


def _number(own: Mapping[str, Any], key: str) -> float:
    value = own.get(key)
    number = float(value) if isinstance(value, int | float) else 0.0
    if isinstance(value, bool) or not isfinite(number) or number <= 0:
        raise ConfigError(f"{key} is {str(value)[:40]!r}: expected a positive number")
    return number


def _structure(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes alone, as in config.json.

    Raises:
        ConfigError: one that is no positive integer, or does not go with another.
    """
    heads, width = count(own, "n_head"), count(own, "n_embd")
    groups = heads if own.get("n_query_groups") is None else count(own, "n_query_groups")
    if heads % groups or (own.get("head_size") is None and width % heads):
        raise ConfigError(f"{heads} heads do not go with n_embd {width} and {groups} query groups")
    given = own.get("intermediate_size") is not None
    return {
        "hidden_size": width,
        "num_hidden_layers": count(own, "n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width // heads if own.get("head_size") is None else count(own, "head_size"),
        "intermediate_size": count(own, "intermediate_size") if given else 4 * width,
        "max_position_embeddings": count(own, "block_size"),
    }


def _gated(own: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """What Llama and its like have in common."""
    return {
        "model_type": model_type,
        **_structure(own),
        "rms_norm_eps": _number(own, "norm_eps"),
        "rope_theta": _number(own, "rope_base"),
        "rope_scaling": _rope(own),
        "hidden_act": "silu",
        "pad_token_id": None,  # classes have numbers of their own for what is not said
    }


def _rope(own: Mapping[str, Any]) -> dict[str, Any] | None:
    given, ratio = own.get(_ROPE), _number(own, "rope_condense_ratio")
    if given is None:
        return None if ratio == 1 else {"rope_type": "linear", "factor": ratio}
    if not isinstance(given, Mapping) or ratio != 1 or {"beta_fast", "beta_slow"} & set(given):
        raise ConfigError("rope_adjustments are neither Llama 3's nor one factor")
    if set(given) == {"factor"}:
        return {"rope_type": "linear", "factor": _number(given, "factor")}
    return {
        "rope_type": "llama3",
        **{key: _number(given, key) for key in _LLAMA3},
        "original_max_position_embeddings": count(given, "original_max_seq_len"),
    }


def _scores(own: Mapping[str, Any], head: int) -> None:
    _check(own, {"attention_scores_scalar": (None, head)})


def _window(own: Mapping[str, Any]) -> int | None:
    """The window of all layers."""
    if own.get("sliding_window_size") is None:
        return None
    if any(flag != 1 for flag in _flags(own)):
        raise ConfigError("sliding_window_indices name layers without a window")
    return count(own, "sliding_window_size")


def _flags(own: Mapping[str, Any]) -> list[Any]:
    given = own.get(_LAYERS)
    if given is not None and not isinstance(given, list):
        raise ConfigError("sliding_window_indices are no list")
    return (given or [])[: count(own, "n_layer")]


def _dense(own: Mapping[str, Any], name: str) -> dict[str, Any]:
    _check(own, _LLAMA)
    qkv = own["attn_bias"] is True
    if "Gemma" in name:
        raise ConfigError("norms of Gemma's kind (one is added to their weights)")
    window = _window(own)
    if own.get("norm_qk"):
        kind = "qwen3"
    elif qkv and not own["bias"]:
        kind = "qwen2"
    else:
        kind = "mistral" if window or name.lower().startswith("mistral") else "llama"
    config = _gated(own, kind)
    _scores(own, config["head_dim"])
    if kind == "mistral":
        _check(own, {"bias": (False,), "rope_adjustments": (None,)})
        return {**config, "sliding_window": window}
    if window is not None:
        raise ConfigError(f"sliding_window_size is given, of a {kind} model")
    if kind == "llama":
        return {**config, "attention_bias": own["bias"] is True, "mlp_bias": own["bias"] is True}
    _check(own, {"bias": (False,)})
    return {**config, "attention_bias": qkv} if kind == "qwen3" else config


def _experts(own: Mapping[str, Any], name: str) -> dict[str, Any]:
    _check(own, {**_LLAMA, "bias": (False,), "attn_bias": (False,)})
    if "Gemma" in name:
        raise ConfigError("norms of Gemma's kind (one is added to their weights)")
    config = _gated(own, "qwen3_moe" if own.get("norm_qk") else "mixtral")
    _scores(own, config["head_dim"])
    config["num_experts_per_tok"] = count(own, "n_expert_per_token")
    inner = own.get("moe_intermediate_size")
    width = config["intermediate_size"] if inner is None else count(own, "moe_intermediate_size")
    if not own.get("norm_qk"):
        own_parts = {"num_local_experts": count(own, "n_expert"), "intermediate_size": width}
        return {**config, **own_parts, "sliding_window": _window(own)}
    _check(own, {"sliding_window_size": (None,)})
    return {
        **config,
        "num_experts": count(own, "n_expert"),
        "moe_intermediate_size": width,
        "norm_topk_prob": True,  # litgpt's softmax is over the chosen experts alone
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _phi3(own: Mapping[str, Any]) -> dict[str, Any]:
    _check(own, _PHI3)
    config = _gated(own, "phi3")
    _scores(own, config["head_dim"])
    return {
        **config,
        "original_max_position_embeddings": config["max_position_embeddings"],
        "partial_rotary_factor": _number(own, "rotary_percentage"),
        "sliding_window": _window(own),
    }


def _gemma2(own: Mapping[str, Any], name: str) -> dict[str, Any]:
    _check(own, _GEMMA2)
    if "Gemma" not in name:  # litgpt's norms add one to their weights by the model's name
        raise ConfigError("a model with GemmaMLP whose name does not say Gemma")
    config = _gated(own, "gemma2")
    flags = _flags(own)
    if flags != [1 - i % 2 for i in range(len(flags))] or len(flags) != config["num_hidden_layers"]:
        raise ConfigError("sliding_window_indices are not 1, 0, 1, 0, ... for every layer")
    caps = ("attention_logit_softcapping", "final_logit_softcapping")
    inner, last = (None if own.get(c) is None else _number(own, c) for c in caps)
    scalar = own.get("attention_scores_scalar")
    act = _act(own)
    return {
        **config,
        "hidden_act": act,
        "hidden_activation": act,
        "query_pre_attn_scalar": (
            config["head_dim"] if scalar is None else count(own, "attention_scores_scalar")
        ),
        "attn_logit_softcapping": inner,
        "final_logit_softcapping": last,
        "sliding_window": count(own, "sliding_window_size"),
    }


def _act(own: Mapping[str, Any]) -> str:
    _check(own, {"gelu_approximate": tuple(_GELU)})
    return _GELU[own["gelu_approximate"]]


def _neox(own: Mapping[str, Any]) -> dict[str, Any]:
    _check(own, _NEOX)
    sizes = _structure(own)
    head, heads = sizes.pop("head_dim"), sizes["num_attention_heads"]
    if sizes.pop("num_key_value_heads") != heads or head * heads != sizes["hidden_size"]:
        raise ConfigError("GPT-NeoX has no query groups, and heads of n_embd / n_head")
    _scores(own, head)
    if not isinstance(own["parallel_residual"], bool):
        raise ConfigError("parallel_residual is neither true nor false")
    return {
        "model_type": "gpt_neox",
        **sizes,
        "layer_norm_eps": _number(own, "norm_eps"),
        "rotary_emb_base": _number(own, "rope_base"),
        "rotary_pct": _number(own, "rotary_percentage"),
        "use_parallel_residual": own["parallel_residual"],
        "attention_bias": True,
        "hidden_act": _act(own),
        "pad_token_id": None,
    }
