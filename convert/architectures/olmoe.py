"""OLMoE (``general.architecture`` = ``olmoe``): experts, queries and keys normed over all heads."""

from __future__ import annotations

from ..gguf.values import f32
from ..tokenizers import TokenizerRule
from ._blocks import (
    FRAME,
    LAYER,
    NORMS,
    attention,
    experts,
    fused_experts,
    head_norms,
    router,
)
from ._record import Architecture

ARCHITECTURE = Architecture(
    name="olmoe",
    classes=("OlmoeForCausalLM",),
    rope="neox",
    defaults={
        "olmoe": {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
    },
    sizes=lambda config: {
        "moe_ff": config["intermediate_size"],
        "2moe_ff": 2 * config["intermediate_size"],
    },
    moe_layer=lambda config, layer: True,
    extra_keys=lambda config: [f32("olmoe.attention.layer_norm_rms_epsilon", 1e-5)],
    restore=lambda stored: {"rms_norm_eps": 1e-5, "clip_qkv": None, "norm_topk_prob": False},
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        *NORMS,
        *attention(),
        *head_norms("q", "kv"),
        router(f"{LAYER}.mlp.gate"),
        *experts(),
        *fused_experts(),
    ),
)
