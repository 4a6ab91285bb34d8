"""GLM-4.5 and 4.6 (``general.architecture`` = ``glm4moe``): experts, shared ones, partial rotary.

The layers of multi-token prediction are kept as further blocks. Rotary embedding in halves.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ..gguf.values import KeyValue, boolean, f32, u32
from ..tokenizers import TokenizerRule
from ._blocks import (
    FRAME,
    LAYER,
    attention,
    correction_bias,
    experts,
    fused_experts,
    gated_mlp,
    head_norms,
    router,
)
from ._config import layer_count, prediction_layers, rope_parameters
from ._glm_like import adjust_vocabulary
from ._record import Architecture, Config, TensorRule, head_dim

_SIGMOID = 2


def _extra_keys(config: Config) -> list[KeyValue]:
    share = rope_parameters(config).get("partial_rotary_factor", 0.5)
    numbers = {
        "rope.dimension_count": int(head_dim(config) * share),
        "expert_count": config.get("n_routed_experts"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_count": config.get("n_shared_experts"),
        "leading_dense_block_count": config.get("first_k_dense_replace"),
        "expert_gating_func": _SIGMOID,
    }
    keys = [u32(f"glm4moe.{key}", n) for key, n in numbers.items() if n is not None]
    keys.append(f32("glm4moe.expert_weights_scale", config["routed_scaling_factor"]))
    keys.append(boolean("glm4moe.expert_weights_norm", config["norm_topk_prob"]))
    if config.get("num_nextn_predict_layers") is not None:
        keys.append(u32("glm4moe.nextn_predict_layers", prediction_layers(config)))
    return keys


def _prediction_layers(config: Config, names: Collection[str]) -> int:
    found = re.findall(r"\.layers\.(\d+)\.eh_proj\.", " ".join(names))
    return sum(int(n) >= layer_count(config) for n in found)


def _next(gguf: str, hf: str, *shape: str) -> TensorRule:
    return TensorRule(
        f"blk.{{n}}.nextn.{gguf}", f"{LAYER}.{hf}", shape, layers="mtp", optional=True
    )


def _sizes(config: Config) -> dict[str, int]:
    return {
        "2hidden": 2 * config["hidden_size"],
        "shared_ff": config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
    }


ARCHITECTURE = Architecture(
    name="glm4moe",
    classes=("Glm4MoeForCausalLM",),
    rope="neox",
    defaults={
        "glm4_moe": {
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        },
    },
    sizes=_sizes,
    moe_layer=lambda config, layer: layer >= config["first_k_dense_replace"],
    prediction_layers=_prediction_layers,
    extra_keys=_extra_keys,
    adjust_vocabulary=adjust_vocabulary,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        TensorRule("blk.{n}.attn_norm", f"{LAYER}.input_layernorm", ("hidden",)),
        TensorRule("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm", ("hidden",)),
        *attention(),
        *head_norms(optional=True),
        *gated_mlp(layers="dense"),
        router(f"{LAYER}.mlp.gate"),
        correction_bias(),
        *experts(),
        *fused_experts(),
        *gated_mlp(
            f"{LAYER}.mlp.shared_experts", "_shexp", "shared_ff", layers="moe",
            needs="n_shared_experts",
        ),
        _next("embed_tokens", "embed_tokens", "vocab", "hidden"),
        _next("enorm", "enorm", "hidden"),
        _next("hnorm", "hnorm", "hidden"),
        _next("eh_proj", "eh_proj", "hidden", "2hidden"),
        _next("shared_head_head", "shared_head.head", "vocab", "hidden"),
        _next("shared_head_norm", "shared_head.norm", "hidden"),
    ),
)  # fmt: skip
