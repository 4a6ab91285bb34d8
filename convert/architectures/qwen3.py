"""Qwen3, dense (``general.architecture`` = ``qwen3``): Qwen2 with per-head query and key norms.

Rotary embedding in halves, as Hugging Face has it: nothing is permuted.
"""

from __future__ import annotations

from ..tokenizers import TokenizerRule
from ._blocks import FRAME, NORMS, attention, gated_mlp, head_norms
from ._record import Architecture

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
    restore=lambda stored: {"attention_bias": stored.has("blk.0.attn_q.bias")},
    tokenizer=TokenizerRule(kinds=("spm", "bpe")),
    tensors=(*FRAME, *NORMS, *attention(), *head_norms(), *gated_mlp()),
)
