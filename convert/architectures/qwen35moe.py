"""Qwen3.5 with experts (``general.architecture`` = ``qwen35moe``): linear attention in most layers.

Of the models with a vision tower the text model is converted.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._blocks import LAYER, experts, fused_experts, router, shared_expert
from ._linear_attention import count_predictions, layer_tags, sizes
from ._qwen35_like import DEFAULTS, keys, tensors
from ._record import Architecture, Config

_common_keys = keys("qwen35moe")


def _extra_keys(config: Config) -> list[KeyValue]:
    shared = config["shared_expert_intermediate_size"]
    return [
        u32("qwen35moe.expert_feed_forward_length", config["moe_intermediate_size"]),
        u32("qwen35moe.expert_shared_feed_forward_length", shared),
        *_common_keys(config),
    ]


ARCHITECTURE = Architecture(
    name="qwen35moe",
    classes=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    composite=("Qwen3_5MoeForConditionalGeneration",),
    rope="neox",
    defaults={
        "qwen3_5_moe_text": {
            **DEFAULTS,
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts_per_tok": 8,
            "num_experts": 256,
        },
    },
    sizes=sizes,
    moe_layer=lambda config, layer: True,
    layer_tags=layer_tags,
    prediction_layers=count_predictions,
    extra_keys=_extra_keys,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=tensors((router(f"{LAYER}.mlp.gate"), *experts(), *fused_experts(), *shared_expert())),
    notes="text only: a vision tower is left out",
)
