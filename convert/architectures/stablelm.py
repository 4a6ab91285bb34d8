"""StableLM 2 and 3B (``general.architecture`` = ``stablelm``): LayerNorm, partial rotary.

The 12B model norms each head by its own weights; they are stacked to one matrix.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, boolean, u32
from ..tokenizers import TokenizerRule
from ._blocks import EMBEDDING, HEAD, LAYER, attention, gated_mlp
from ._config import rope_parameters
from ._record import Architecture, Config, TensorRule, head_dim


def _extra_keys(config: Config) -> list[KeyValue]:
    share = rope_parameters(config)["partial_rotary_factor"]
    return [
        u32("stablelm.rope.dimension_count", int(share * head_dim(config))),
        boolean("stablelm.use_parallel_residual", config["use_parallel_residual"]),
    ]


def _norm(gguf: str, hf: str, needs: str = "") -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{LAYER}.{hf}", ("hidden",), bias="yes", needs=needs)


def _head_norm(gguf: str, hf: str, how: str) -> TensorRule:
    name = f"{LAYER}.self_attn.{hf}"
    return TensorRule(f"blk.{{n}}.{gguf}", name, ("head",), how, needs="qk_layernorm")


ARCHITECTURE = Architecture(
    name="stablelm",
    classes=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    rope="neox",
    defaults={
        "stablelm": {
            "vocab_size": 50304,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "use_parallel_residual": False,
        },
    },
    extra_keys=_extra_keys,
    key_order=(
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "rope.dimension_count",
        "attention.head_count",
        "attention.head_count_kv",
        "use_parallel_residual",
        "attention.layer_norm_epsilon",
        "general.file_type",
    ),
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        EMBEDDING,
        HEAD,
        TensorRule("output_norm", "model.norm", ("hidden",), bias="yes"),
        _norm("attn_norm", "input_layernorm"),
        _norm("ffn_norm", "post_attention_layernorm", needs="!use_parallel_residual"),
        *attention(out_bias="no"),
        _head_norm("attn_q_norm", "q_layernorm.norms.{h}", "stack_heads"),
        _head_norm("attn_k_norm", "k_layernorm.norms.{k}", "stack_kv_heads"),
        *gated_mlp(),
    ),
)
