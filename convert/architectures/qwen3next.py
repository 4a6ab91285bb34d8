"""Qwen3-Next (``general.architecture`` = ``qwen3next``): linear attention, experts.

The projection of linear attention comes key head by key head and is brought into q|k|v and gate.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, experts, fused_experts, router, shared_expert
from ._linear_attention import (
    count_predictions,
    exact,
    full_attention,
    layer_tags,
    linear,
    linear_keys,
    norm,
    sizes,
    with_prediction,
)
from ._record import Architecture, Config, TensorRule
from .qwen3moe import is_moe_layer

_linear_keys = linear_keys("qwen3next")


def _extra_keys(config: Config) -> list[KeyValue]:
    return [
        u32("qwen3next.expert_feed_forward_length", config["moe_intermediate_size"]),
        u32(
            "qwen3next.expert_shared_feed_forward_length", config["shared_expert_intermediate_size"]
        ),
        *_linear_keys(config),
    ]


ARCHITECTURE = Architecture(
    name="qwen3next",
    classes=("Qwen3NextForCausalLM",),
    rope="neox",
    defaults={
        "qwen3_next": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts_per_tok": 10,
            "num_experts": 512,
        },
    },
    sizes=sizes,
    moe_layer=is_moe_layer,
    layer_tags=layer_tags,
    prediction_layers=count_predictions,
    extra_keys=_extra_keys,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME[:2],
        TensorRule("output_norm", "model.norm", ("hidden",), "plus_one"),
        *with_prediction(
            (
                norm("attn_norm", "input_layernorm"),
                norm("post_attention_norm", "post_attention_layernorm"),
                *full_attention(),
                exact("ssm_a", "A_log", "value_heads", transform="negative_exp"),
                exact("ssm_dt.bias", "dt_bias", "value_heads"),
                exact(
                    "ssm_conv1d.weight", "conv1d.weight", "mixed", "one", "kernel",
                    transform="squeeze", keep_f32=True,
                ),
                TensorRule(
                    ("blk.{n}.attn_qkv", "blk.{n}.attn_gate"),
                    f"{LAYER}.linear_attn.in_proj_qkvz",
                    ("qkvz", "hidden"),
                    "split_qkvz",
                    layers="linear",
                ),
                linear("ssm_ba", "in_proj_ba", "2value_heads", "hidden"),
                linear("ssm_norm", "norm", "value_head"),
                linear("ssm_out", "out_proj", "hidden", "values"),
                router(f"{LAYER}.mlp.gate"),
                *experts(),
                *fused_experts(),
                *shared_expert(),
            )
        ),
    ),
)  # fmt: skip
