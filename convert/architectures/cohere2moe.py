"""Command A with experts (``general.architecture`` = ``cohere2moe``).

Most layers have a sliding window, the others no rope. Rotary pairs are adjacent on both sides.
"""

from __future__ import annotations

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, boolean, booleans, f32, string, u32
from ..tokenizers import TokenizerRule
from ._blocks import EMBEDDING, LAYER, attention, experts, fused_experts, gated_mlp, router
from ._config import layer_count
from ._record import Architecture, Config, TensorRule

_PERIOD = 4


def _layer_types(config: Config) -> list[str]:
    period = config.get("sliding_window_pattern") or _PERIOD
    return [
        "sliding_attention" if (n + 1) % period else "full_attention"
        for n in range(layer_count(config))
    ]


def _dense_lead(config: Config) -> int:
    """Return how many layers come before the first with experts."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return int(config.get("first_k_dense_replace") or 0)
    return next((n for n, kind in enumerate(kinds) if kind != "dense"), len(kinds))


def _extra_keys(config: Config) -> list[KeyValue]:
    ff, shared = config["intermediate_size"], config.get("num_shared_experts") or 0
    if shared and config.get("shared_expert_combination_strategy", "average") != "average":
        raise UnsupportedError("config.json: shared experts that are not averaged with the others")
    local = [kind == "sliding_attention" for kind in config["layer_types"]]
    keys = [
        f32("cohere2moe.logit_scale", config["logit_scale"]),
        u32("cohere2moe.attention.sliding_window", config["sliding_window"]),
        booleans("cohere2moe.attention.sliding_window_pattern", local),
        u32("cohere2moe.vocab_size", config["vocab_size"]),
        u32("cohere2moe.expert_feed_forward_length", ff),
        u32("cohere2moe.leading_dense_block_count", _dense_lead(config)),
        boolean("cohere2moe.expert_weights_norm", config["norm_topk_prob"]),
    ]
    if shared:
        keys.append(u32("cohere2moe.expert_shared_count", shared))
        keys.append(u32("cohere2moe.expert_shared_feed_forward_length", ff * shared))
    return [
        *keys,
        u32("cohere2moe.rope.dimension_count", config["head_dim"]),
        string("cohere2moe.rope.scaling.type", "none"),
    ]


def _sizes(config: Config) -> dict[str, int]:
    ff = config["intermediate_size"]
    return {
        "moe_ff": ff,
        "2moe_ff": 2 * ff,
        "shared_ff": ff * (config.get("num_shared_experts") or 0),
        "dense_ff": config.get("prefix_dense_intermediate_size") or ff,
    }


ARCHITECTURE = Architecture(
    name="cohere2moe",
    classes=("Cohere2MoeForCausalLM",),
    rope="norm",
    defaults={
        "cohere2_moe": {
            "vocab_size": 256000,
            "hidden_size": 8192,
            "intermediate_size": 22528,
            "num_hidden_layers": 40,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "head_dim": 128,
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "layer_types": _layer_types,
            "logit_scale": 0.0625,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 0,
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    },
    sizes=_sizes,
    moe_layer=lambda config, layer: layer >= _dense_lead(config),
    drop_tied_head=True,
    extra_keys=_extra_keys,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        EMBEDDING,
        TensorRule("output_norm", "model.norm", ("hidden",)),
        TensorRule("blk.{n}.attn_norm", f"{LAYER}.input_layernorm", ("hidden",)),
        *attention(bias="no"),
        *gated_mlp(size="dense_ff", layers="dense"),
        router(f"{LAYER}.mlp.gate"),
        *experts(),
        *fused_experts(),
        *gated_mlp(
            f"{LAYER}.mlp.shared_experts", "_shexp", "shared_ff", layers="moe",
            needs="num_shared_experts",
        ),
    ),
)  # fmt: skip
