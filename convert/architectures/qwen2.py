"""Qwen2 and Qwen2.5, dense (``general.architecture`` = ``qwen2``): Llama with q, k, v biases.

Rotary embedding in halves, as Hugging Face has it: nothing is permuted.
"""

from __future__ import annotations

from ..tokenizers import TokenizerRule
from ._blocks import FRAME, NORMS, attention, gated_mlp
from ._record import Architecture

ARCHITECTURE = Architecture(
    name="qwen2",
    classes=("Qwen2ForCausalLM", "Qwen2Model"),
    headless=("Qwen2Model",),
    rope="neox",
    defaults={
        "qwen2": {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
    },
    restore=lambda stored: {},
    tokenizer=TokenizerRule(kinds=("spm", "bpe")),
    tensors=(*FRAME, *NORMS, *attention(bias="yes", out_bias="no"), *gated_mlp()),
)
