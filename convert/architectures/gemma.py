"""Gemma 1 and CodeGemma (``general.architecture`` = ``gemma``).

Hugging Face stores norm weights minus one; llama.cpp wants them whole. The head is the embedding.
"""

from __future__ import annotations

from dataclasses import replace

from ..gguf.values import u32
from ..tokenizers import Vocabulary
from ._blocks import EMBEDDING, LAYER, attention, gated_mlp
from ._gemma_like import FINAL_NORM, IGNORED, TOKENIZER, adjust_vocabulary
from ._record import Architecture, Config, TensorRule

_END_OF_TURN = 107


def _adjust_vocabulary(vocabulary: Vocabulary, config: Config) -> Vocabulary:
    turn = u32("tokenizer.ggml.eot_token_id", _END_OF_TURN)
    return adjust_vocabulary(replace(vocabulary, extra=(turn,)), config)


ARCHITECTURE = Architecture(
    name="gemma",
    classes=("GemmaForCausalLM",),
    rope="neox",
    defaults={
        "gemma": {
            "vocab_size": 256000,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        },
    },
    ignored=IGNORED,
    key_order=(
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "attention.key_length",
        "attention.value_length",
        "general.file_type",
    ),
    restore=lambda stored: {},
    tokenizer=TOKENIZER,
    adjust_vocabulary=_adjust_vocabulary,
    tensors=(
        EMBEDDING,
        FINAL_NORM,
        TensorRule("blk.{n}.attn_norm", f"{LAYER}.input_layernorm", ("hidden",), "plus_one"),
        TensorRule(
            "blk.{n}.ffn_norm", f"{LAYER}.post_attention_layernorm", ("hidden",), "plus_one"
        ),
        *attention(),
        *gated_mlp(),
    ),
)
