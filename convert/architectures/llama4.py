"""Llama 4, text (``general.architecture`` = ``llama4``): experts in every or every other layer.

Experts are stored [experts, in, out], gate beside up; they are transposed and parted. Rotary pairs
are adjacent on both sides. Of the models with a vision tower the text model is converted.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, NORMS, attention, gated_mlp, router
from ._llama_like import extra_keys, rope_freqs
from ._record import Architecture, Config, ExtraTensor, TensorRule

_FF = f"{LAYER}.feed_forward"
_common_keys = extra_keys("llama4")


def _extra_keys(config: Config) -> list[KeyValue]:
    keys = [
        u32("llama4.feed_forward_length", config["intermediate_size_mlp"]),
        *_common_keys(config),
        u32("llama4.interleave_moe_layer_step", config["interleave_moe_layer_step"]),
        u32("llama4.expert_feed_forward_length", config["intermediate_size"]),
    ]
    kinds = config.get("layer_types")
    if kinds and all(kind == "full_attention" for kind in kinds):
        keys.append(u32("llama4.attention.sliding_window", 0))
    return keys


ARCHITECTURE = Architecture(
    name="llama4",
    classes=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    composite=("Llama4ForConditionalGeneration",),
    rope="norm",
    defaults={
        "llama4_text": {
            "vocab_size": 202048,
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
    },
    sizes=lambda config: {
        "ff": config["intermediate_size_mlp"],
        "moe_ff": config["intermediate_size"],
        "2moe_ff": 2 * config["intermediate_size"],
    },
    moe_layer=lambda config, layer: (layer + 1) % config["interleave_moe_layer_step"] == 0,
    extra_keys=_extra_keys,
    extra_tensors=(ExtraTensor("rope_freqs.weight", rope_freqs),),
    tokenizer=TokenizerRule(kinds=("bpe",), space_prefix=False),
    tensors=(
        *FRAME,
        *NORMS,
        *attention(),
        *gated_mlp(_FF, layers="dense"),
        router(f"{_FF}.router"),
        TensorRule(
            "blk.{n}.ffn_down_exps.weight",
            f"{_FF}.experts.down_proj",
            ("experts", "moe_ff", "hidden"),
            "transpose",
            exact=True,
            layers="moe",
        ),
        TensorRule(
            ("blk.{n}.ffn_gate_exps.weight", "blk.{n}.ffn_up_exps.weight"),
            f"{_FF}.experts.gate_up_proj",
            ("experts", "hidden", "2moe_ff"),
            "transpose_split_gate_up",
            exact=True,
            layers="moe",
        ),
        *gated_mlp(f"{_FF}.shared_expert", "_shexp", "moe_ff", layers="moe"),
    ),
    notes="text only: a vision tower is left out",
)
