"""Gemma 3, text (``general.architecture`` = ``gemma3``): local and global layers, q and k norms.

Hugging Face stores norm weights minus one; llama.cpp wants them whole. The head is the embedding.
Of the models with a vision tower the text model is converted.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, f32, u32
from ._blocks import EMBEDDING, attention, gated_mlp, head_norms
from ._gemma_like import FINAL_NORM, IGNORED, NORMS, TOKENIZER, adjust_vocabulary, query_scale
from ._record import Architecture, Config
from ._restore import Stored


def _extra_keys(config: Config) -> list[KeyValue]:
    keys = []
    if config.get("final_logit_softcapping"):
        keys.append(f32("gemma3.final_logit_softcapping", config["final_logit_softcapping"]))
    if config.get("sliding_window_pattern") != 1:
        keys.append(u32("gemma3.attention.sliding_window", config["sliding_window"]))
    return keys


def _restore(stored: Stored) -> dict[str, object]:
    own: dict[str, object] = {
        "query_pre_attn_scalar": query_scale(stored, 62),
        "final_logit_softcapping": None,
    }
    if "final_logit_softcapping" in stored.keys:
        own["final_logit_softcapping"] = stored.number("final_logit_softcapping")
    if "attention.sliding_window" in stored.keys:
        own["sliding_window"] = stored.whole("attention.sliding_window")
    else:
        own["sliding_window_pattern"] = 1
    return own


ARCHITECTURE = Architecture(
    name="gemma3",
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    composite=("Gemma3ForConditionalGeneration",),
    rope="neox",
    defaults={
        "gemma3_text": {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
    },
    ignored=IGNORED,
    extra_keys=_extra_keys,
    restore=_restore,
    tokenizer=TOKENIZER,
    adjust_vocabulary=adjust_vocabulary,
    tensors=(
        EMBEDDING,
        FINAL_NORM,
        *NORMS,
        *attention(),
        *head_norms(transform="plus_one"),
        *gated_mlp(),
    ),
    notes="text only: a vision tower is left out",
)
