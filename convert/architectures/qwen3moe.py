"""Qwen3 with experts (``general.architecture`` = ``qwen3moe``).

On the hub an expert is three matrices; transformers 5 fuses all experts of a layer in memory.
"""

from __future__ import annotations

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, u32
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
from ._record import Architecture, Config
from ._restore import Stored


def _extra_keys(config: Config) -> list[KeyValue]:
    return [u32("qwen3moe.expert_feed_forward_length", config["moe_intermediate_size"])]


def is_moe_layer(config: Config, layer: int) -> bool:
    """Return whether a layer of Qwen2-MoE or Qwen3-MoE has experts: llama.cpp knows no others.

    Raises:
        UnsupportedError: it has none.
    """
    dense = layer in (config.get("mlp_only_layers") or ())
    if dense or (layer + 1) % (config.get("decoder_sparse_step") or 1):
        raise UnsupportedError(
            f"config.json: layer {layer} has no experts (mlp_only_layers, decoder_sparse_step); "
            "llama.cpp runs only models with experts in every layer"
        )
    return True


def _restore(stored: Stored) -> dict[str, object]:
    return {
        "num_local_experts": ...,
        "num_experts": stored.whole("expert_count"),
        "moe_intermediate_size": stored.whole("expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp knows no other
        "attention_bias": stored.has("blk.0.attn_q.bias"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


ARCHITECTURE = Architecture(
    name="qwen3moe",
    classes=("Qwen3MoeForCausalLM",),
    rope="neox",
    defaults={
        "qwen3_moe": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "num_local_experts": lambda config: config.get("num_experts", 128),
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    },
    moe_layer=is_moe_layer,
    extra_keys=_extra_keys,
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        *NORMS,
        *attention(),
        *head_norms(),
        router(f"{LAYER}.mlp.gate"),
        *experts(),
        *fused_experts(),
    ),
)
