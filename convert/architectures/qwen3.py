"""Qwen3, dense (``general.architecture`` = ``qwen3``): Qwen2 with per-head query and key norms.

Rotary embedding in halves, as Hugging Face has it: nothing is permuted.
"""

from __future__ import annotations

from ..tokenizers import TokenizerRule
from ._record import Architecture, TensorRule

_LAYER = "model.layers.{n}"

ARCHITECTURE = Architecture(
    name="qwen3",
    classes=("Qwen3ForCausalLM", "Qwen3Model"),
    rope="neox",
    defaults={
        "qwen3": {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
    },
    tokenizer=TokenizerRule(kinds=("spm", "bpe")),
    tensors=(
        TensorRule("token_embd", "model.embed_tokens", ("vocab", "hidden")),
        TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True),
        TensorRule("output_norm", "model.norm", ("hidden",)),
        TensorRule("blk.{n}.attn_norm", f"{_LAYER}.input_layernorm", ("hidden",)),
        TensorRule("blk.{n}.attn_q", f"{_LAYER}.self_attn.q_proj", ("q", "hidden"), bias="maybe"),
        TensorRule("blk.{n}.attn_k", f"{_LAYER}.self_attn.k_proj", ("kv", "hidden"), bias="maybe"),
        TensorRule("blk.{n}.attn_v", f"{_LAYER}.self_attn.v_proj", ("kv", "hidden"), bias="maybe"),
        TensorRule("blk.{n}.attn_q_norm", f"{_LAYER}.self_attn.q_norm", ("head",)),
        TensorRule("blk.{n}.attn_k_norm", f"{_LAYER}.self_attn.k_norm", ("head",)),
        TensorRule(
            "blk.{n}.attn_output", f"{_LAYER}.self_attn.o_proj", ("hidden", "q"), bias="maybe"
        ),
        TensorRule("blk.{n}.ffn_norm", f"{_LAYER}.post_attention_layernorm", ("hidden",)),
        TensorRule("blk.{n}.ffn_gate", f"{_LAYER}.mlp.gate_proj", ("ff", "hidden")),
        TensorRule("blk.{n}.ffn_up", f"{_LAYER}.mlp.up_proj", ("ff", "hidden")),
        TensorRule("blk.{n}.ffn_down", f"{_LAYER}.mlp.down_proj", ("hidden", "ff")),
    ),
)
