"""Qwen1.5-MoE and Qwen2-MoE (``general.architecture`` = ``qwen2moe``): with a shared expert."""

from __future__ import annotations

from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._blocks import (
    FRAME,
    LAYER,
    NORMS,
    attention,
    experts,
    fused_experts,
    router,
    shared_expert,
)
from ._record import Architecture, Config
from ._restore import Stored
from .qwen3moe import is_moe_layer


def _extra_keys(config: Config) -> list[KeyValue]:
    return [
        u32("qwen2moe.expert_feed_forward_length", config["moe_intermediate_size"]),
        u32(
            "qwen2moe.expert_shared_feed_forward_length", config["shared_expert_intermediate_size"]
        ),
    ]


def _restore(stored: Stored) -> dict[str, object]:
    return {
        "moe_intermediate_size": stored.whole("expert_feed_forward_length"),
        "shared_expert_intermediate_size": stored.whole("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,  # llama.cpp knows no other
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


ARCHITECTURE = Architecture(
    name="qwen2moe",
    classes=("Qwen2MoeForCausalLM",),
    rope="neox",
    defaults={
        "qwen2_moe": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    },
    sizes=lambda config: {"one": 1},
    moe_layer=is_moe_layer,
    extra_keys=_extra_keys,
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        *NORMS,
        *attention(out_bias="no"),
        router(f"{LAYER}.mlp.gate"),
        *experts(),
        *fused_experts(),
        *shared_expert(),
    ),
)
