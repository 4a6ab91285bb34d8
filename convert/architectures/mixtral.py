"""Mixtral (``general.architecture`` = ``llama``): Llama with experts in place of the MLP.

On the hub an expert is ``w1`` (gate), ``w2`` (down), ``w3`` (up); transformers 5 fuses them in
memory. Rotary pairs are adjacent in llama.cpp, so query and key rows are permuted.
"""

from __future__ import annotations

from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, NORMS, attention, experts, fused_experts, router
from ._llama_like import adjust_vocabulary, extra_keys, restore, rope_freqs
from ._record import Architecture, ExtraTensor

ARCHITECTURE = Architecture(
    name="llama",
    classes=("MixtralForCausalLM",),
    rope="norm",
    defaults={
        "mixtral": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    },
    sizes=lambda config: {
        "moe_ff": config["intermediate_size"],
        "2moe_ff": 2 * config["intermediate_size"],
    },
    moe_layer=lambda config, layer: True,
    extra_keys=extra_keys("llama"),
    extra_tensors=(ExtraTensor("rope_freqs.weight", rope_freqs),),
    restore=restore,
    adjust_vocabulary=adjust_vocabulary,
    tokenizer=TokenizerRule(kinds=("tekken", "spm", "spm_json", "bpe"), space_prefix=True),
    tensors=(
        *FRAME,
        *NORMS,
        *attention(permuted=True),
        router(f"{LAYER}.block_sparse_moe.gate"),
        *experts(
            f"{LAYER}.block_sparse_moe.experts", (("gate", "w1"), ("down", "w2"), ("up", "w3"))
        ),
        router(f"{LAYER}.mlp.gate"),
        *fused_experts(),
    ),
)
