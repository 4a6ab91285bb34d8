"""OLMo 1 (``general.architecture`` = ``olmo``): Llama with norms that have no weights.

Rotary pairs are adjacent in llama.cpp, so query and key rows are permuted.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, f32
from ..tokenizers import TokenizerRule
from ._blocks import EMBEDDING, HEAD, attention, gated_mlp
from ._record import Architecture, Config
from ._restore import Stored


def _extra_keys(config: Config) -> list[KeyValue]:
    keys = [f32("olmo.attention.layer_norm_epsilon", 1e-5)]
    if config.get("clip_qkv") is not None:
        keys.append(f32("olmo.attention.clamp_kqv", config["clip_qkv"]))
    return keys


def _restore(stored: Stored) -> dict[str, object]:
    key = "attention.clamp_kqv"
    return {
        "layer_norm_eps": ...,
        "clip_qkv": stored.number(key) if key in stored.keys else None,
    }


ARCHITECTURE = Architecture(
    name="olmo",
    classes=("OlmoForCausalLM",),
    rope="norm",
    defaults={
        "olmo": {
            "vocab_size": 50304,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
        },
    },
    extra_keys=_extra_keys,
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(EMBEDDING, HEAD, *attention(permuted=True, bias="no"), *gated_mlp()),
)
