"""Llama 1 to 3, Mistral and what shares their layout (``general.architecture`` = ``llama``).

Rotary pairs are adjacent in llama.cpp, so query and key rows are permuted. Llama 3's rope scaling
becomes the ``rope_freqs`` tensor: one divisor per frequency.
"""

from __future__ import annotations

from ..tokenizers import TokenizerRule
from ._blocks import FRAME, NORMS, attention, gated_mlp
from ._llama_like import adjust_vocabulary, extra_keys, restore, rope_freqs
from ._record import Architecture, ExtraTensor, head_dim, heads

ARCHITECTURE = Architecture(
    name="llama",
    classes=("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "LlamaModel"),
    headless=("LlamaModel",),
    rope="norm",
    defaults={
        "llama": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": heads,
            "head_dim": head_dim,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
        "mistral": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": head_dim,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
    },
    extra_keys=extra_keys("llama"),
    extra_tensors=(ExtraTensor("rope_freqs.weight", rope_freqs),),
    restore=restore,
    tokenizer=TokenizerRule(kinds=("tekken", "spm", "spm_json", "bpe"), space_prefix=True),
    adjust_vocabulary=adjust_vocabulary,
    tensors=(*FRAME, *NORMS, *attention(permuted=True), *gated_mlp(bias="maybe")),
)
