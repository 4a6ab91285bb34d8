"""Gemma 3n, text (``general.architecture`` = ``gemma3n``): AltUp, LAuReL, embeddings per layer.

Norm weights are stored whole. The embeddings lack the rows of images and sounds, which come from
elsewhere; zeros stand in for them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, booleans, f32, f32_array, u32
from ..tokenizers import TokenizerRule
from ._blocks import LAYER, attention, gated_mlp, head_norms
from ._config import layer_count
from ._gemma_like import IGNORED, adjust_vocabulary
from ._record import Architecture, Config, TensorRule

_INPUTS = 4  # of AltUp; llama.cpp knows no other number
_PERIOD = 5


def _layer_types(config: Config) -> list[str]:
    return [
        "sliding_attention" if (n + 1) % _PERIOD else "full_attention"
        for n in range(layer_count(config))
    ]


def _cut(share: float) -> float:
    """Return below how many deviations a share of normal values lies; float32 in every step."""
    if not share:
        return float("-inf")
    root = math.sqrt(2)
    centred = np.float32(2) * np.float32(share) - np.float32(1)
    inverse = np.float32(NormalDist().inv_cdf((1 + float(centred)) / 2) / root)
    return float(inverse * np.float32(root))


def _extra_keys(config: Config) -> list[KeyValue]:
    if config["altup_num_inputs"] != _INPUTS:
        raise UnsupportedError(f"config.json: altup_num_inputs is not {_INPUTS}")
    keys = []
    if config.get("final_logit_softcapping"):
        keys.append(f32("gemma3n.final_logit_softcapping", config["final_logit_softcapping"]))
    numbers = {
        "attention.sliding_window": config["sliding_window"],
        "altup.active_idx": config["altup_active_idx"],
        "altup.num_inputs": _INPUTS,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
    }
    keys += [u32(f"gemma3n.{key}", n) for key, n in numbers.items()]
    cuts = [_cut(share) for share in config["activation_sparsity_pattern"]]
    local = [kind == "sliding_attention" for kind in config["layer_types"]]
    return [
        *keys,
        f32_array("gemma3n.activation_sparsity_scale", cuts),
        booleans("gemma3n.attention.sliding_window_pattern", local),
    ]


def _sizes(config: Config) -> dict[str, int]:
    per_layer, ff = config["hidden_size_per_layer_input"], config["intermediate_size"]
    return {
        "ff": ff[0] if isinstance(ff, list) else ff,
        "per_layer": per_layer,
        "all_layers": per_layer * layer_count(config),
        "inputs": _INPUTS,
        "squared": _INPUTS**2,
        "others": _INPUTS - 1,
        "laurel": config["laurel_rank"],
    }


def _rule(gguf: str, hf: str, *shape: str, keep_f32: bool = False) -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{LAYER}.{hf}", shape, keep_f32=keep_f32)


def _attention() -> tuple[TensorRule, ...]:
    """Return attention; layers that use other keys and values may come without their own."""
    rules = (*attention(), *head_norms())
    shared = ("attn_k", "attn_v", "attn_k_norm")
    return tuple(replace(rule, optional=str(rule.gguf).endswith(shared)) for rule in rules)


def _stacked(gguf: str, hf: str) -> TensorRule:
    return TensorRule(gguf, f"model.{hf}.{{a}}", ("hidden", "hidden"))


ARCHITECTURE = Architecture(
    name="gemma3n",
    classes=("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
    composite=("Gemma3nForConditionalGeneration",),
    rope="neox",
    defaults={
        "gemma3n_text": {
            "vocab_size": 262400,
            "hidden_size": 2048,
            "num_hidden_layers": 35,
            "intermediate_size": lambda config: [16384] * layer_count(config),
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window": 512,
            "layer_types": _layer_types,
            "final_logit_softcapping": 30.0,
            "hidden_size_per_layer_input": 256,
            "altup_active_idx": 0,
            "altup_num_inputs": 4,
            "num_kv_shared_layers": 15,
            "laurel_rank": 64,
            "activation_sparsity_pattern": lambda config: (
                [0.95] * 10 + [0.0] * (layer_count(config) - 10)
            ),
            "tie_word_embeddings": True,
        },
    },
    sizes=_sizes,
    ignored=IGNORED,
    extra_keys=_extra_keys,
    adjust_vocabulary=adjust_vocabulary,
    tokenizer=TokenizerRule(kinds=("spm",)),
    tensors=(
        TensorRule("token_embd", "model.embed_tokens", (), "fill_rows"),
        TensorRule("output_norm", "model.norm", ("hidden",)),
        TensorRule(
            "per_layer_token_embd", "model.embed_tokens_per_layer", (), "fill_rows"
        ),
        TensorRule(
            "per_layer_model_proj", "model.per_layer_model_projection", ("all_layers", "hidden")
        ),
        TensorRule("per_layer_proj_norm", "model.per_layer_projection_norm", ("per_layer",)),
        _stacked("altup_proj", "altup_projections"),
        _stacked("altup_unembd_proj", "altup_unembed_projections"),
        _rule("attn_norm", "input_layernorm", "hidden"),
        _rule("post_attention_norm", "post_attention_layernorm", "hidden"),
        _rule("ffn_norm", "pre_feedforward_layernorm", "hidden"),
        _rule("post_ffw_norm", "post_feedforward_layernorm", "hidden"),
        *_attention(),
        *gated_mlp(),
        TensorRule(
            "blk.{n}.altup_correct_scale.weight", f"{LAYER}.altup.correct_output_scale",
            ("hidden",), exact=True,
        ),
        _rule("altup_correct_coef", "altup.correction_coefs", "inputs", "inputs", keep_f32=True),
        _rule("altup_predict_coef", "altup.prediction_coefs", "squared", "inputs", keep_f32=True),
        _rule("altup_router", "altup.modality_router", "inputs", "hidden"),
        _rule("altup_router_norm", "altup.router_norm", "hidden"),
        _rule("laurel_l", "laurel.linear_left", "laurel", "hidden"),
        _rule("laurel_r", "laurel.linear_right", "hidden", "laurel"),
        _rule("laurel_post_norm", "laurel.post_laurel_norm", "hidden"),
        _rule("inp_gate", "per_layer_input_gate", "per_layer", "hidden"),
        _rule("proj", "per_layer_projection", "hidden", "per_layer"),
        _rule("post_norm", "post_per_layer_input_norm", "hidden"),
    ),
    notes="text only; llama.cpp wants the keys and values of all layers, as the hub has them",
)  # fmt: skip
