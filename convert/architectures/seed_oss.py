"""Seed-OSS (``general.architecture`` = ``seed_oss``): Llama's layout, biased projections.

Rotary embedding in halves.
"""

from __future__ import annotations

from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, attention, gated_mlp
from ._record import Architecture, TensorRule

ARCHITECTURE = Architecture(
    name="seed_oss",
    classes=("SeedOssForCausalLM",),
    rope="neox",
    defaults={
        "seed_oss": {
            "vocab_size": 155136,
            "hidden_size": 4096,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 80,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
    },
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        TensorRule("blk.{n}.attn_norm", f"{LAYER}.input_layernorm", ("hidden",)),
        TensorRule("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm", ("hidden",)),
        *attention(),
        *gated_mlp(bias="maybe"),
    ),
)
