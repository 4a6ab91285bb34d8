"""Phi-1, 1.5 and 2 (``general.architecture`` = ``phi2``): parallel attention and MLP, biases.

One LayerNorm for both; partial rotary, in halves.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, boolean, u32
from ..tokenizers import TokenizerRule
from ._blocks import EMBEDDING, LAYER
from ._config import rope_parameters
from ._record import Architecture, Config, TensorRule, heads


def _extra_keys(config: Config) -> list[KeyValue]:
    width, count = config["hidden_size"], config["num_attention_heads"]
    share = rope_parameters(config)["partial_rotary_factor"]
    return [
        u32("phi2.feed_forward_length", 4 * width),
        u32("phi2.attention.head_count_kv", count),
        u32("phi2.rope.dimension_count", int(share * width) // count),
        boolean("tokenizer.ggml.add_bos_token", False),
    ]


def _rule(gguf: str, hf: str, *shape: str) -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{LAYER}.{hf}", shape, bias="yes")


ARCHITECTURE = Architecture(
    name="phi2",
    classes=("PhiForCausalLM",),
    rope="neox",
    defaults={
        "phi": {
            "vocab_size": 51200,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": heads,
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    extra_keys=_extra_keys,
    key_order=(
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_epsilon",
        "rope.dimension_count",
        "general.file_type",
        "tokenizer.ggml.add_bos_token",
    ),
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        EMBEDDING,
        TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True, bias="yes"),
        TensorRule("output_norm", "model.final_layernorm", ("hidden",), bias="yes"),
        _rule("attn_norm", "input_layernorm", "hidden"),
        _rule("attn_q", "self_attn.q_proj", "q", "hidden"),
        _rule("attn_k", "self_attn.k_proj", "kv", "hidden"),
        _rule("attn_v", "self_attn.v_proj", "kv", "hidden"),
        _rule("attn_output", "self_attn.dense", "hidden", "q"),
        _rule("ffn_up", "mlp.fc1", "ff", "hidden"),
        _rule("ffn_down", "mlp.fc2", "hidden", "ff"),
    ),
)
