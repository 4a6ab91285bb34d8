"""Gemma 2 (``general.architecture`` = ``gemma2``): soft-capped logits, norms on both sides.

Hugging Face stores norm weights minus one; llama.cpp wants them whole. The head is the embedding.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, f32, u32
from ._blocks import EMBEDDING, attention, gated_mlp
from ._gemma_like import FINAL_NORM, IGNORED, NORMS, TOKENIZER, adjust_vocabulary, query_scale
from ._record import Architecture, Config
from ._restore import Stored


def _extra_keys(config: Config) -> list[KeyValue]:
    return [
        f32("gemma2.attn_logit_softcapping", config["attn_logit_softcapping"]),
        f32("gemma2.final_logit_softcapping", config["final_logit_softcapping"]),
        u32("gemma2.attention.sliding_window", config["sliding_window"]),
    ]


def _restore(stored: Stored) -> dict[str, object]:
    return {
        "attn_logit_softcapping": stored.number("attn_logit_softcapping"),
        "final_logit_softcapping": stored.number("final_logit_softcapping"),
        "sliding_window": stored.whole("attention.sliding_window"),
        "query_pre_attn_scalar": query_scale(stored, 46),
        "rope_theta": stored.number("rope.freq_base", 10000.0),
    }


ARCHITECTURE = Architecture(
    name="gemma2",
    classes=("Gemma2ForCausalLM",),
    rope="neox",
    defaults={
        "gemma2": {
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
    },
    ignored=IGNORED,
    extra_keys=_extra_keys,
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
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attention.sliding_window",
    ),
    restore=_restore,
    tokenizer=TOKENIZER,
    adjust_vocabulary=adjust_vocabulary,
    tensors=(EMBEDDING, FINAL_NORM, *NORMS, *attention(), *gated_mlp()),
)
