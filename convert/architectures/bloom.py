"""BLOOM (``general.architecture`` = ``bloom``): alibi positions, LayerNorm with biases.

The fused q|k|v comes head by head and is brought into three blocks.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._record import Architecture, Config, TensorRule

_LAYER = "transformer.h.{n}"


def _extra_keys(config: Config) -> list[KeyValue]:
    width = config["hidden_size"]
    return [
        u32("bloom.context_length", config.get("seq_length", width)),
        u32("bloom.feed_forward_length", 4 * width),
        u32("bloom.attention.head_count_kv", config["num_attention_heads"]),
    ]


def _rule(gguf: str, hf: str, *shape: str, transform: str = "") -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.{hf}", shape, transform, bias="yes")


def _frame(gguf: str, hf: str) -> TensorRule:
    return TensorRule(gguf, f"transformer.{hf}", ("hidden",), bias="yes")


ARCHITECTURE = Architecture(
    name="bloom",
    classes=("BloomForCausalLM", "BloomModel"),
    headless=("BloomModel",),
    prefix="transformer.",
    rope="",
    defaults={
        "bloom": {
            "vocab_size": 250880,
            "hidden_size": lambda config: config.get("n_embed", 64),
            "n_layer": lambda config: config.get("num_hidden_layers", 2),
            "n_head": 8,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
    },
    synonyms={"n_head": "num_attention_heads"},
    sizes=lambda config: {"ff": 4 * config["hidden_size"]},
    extra_keys=_extra_keys,
    key_order=(
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_epsilon",
        "general.file_type",
    ),
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        TensorRule("token_embd", "transformer.word_embeddings", ("vocab", "hidden")),
        _frame("token_embd_norm", "word_embeddings_layernorm"),
        TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True),
        _frame("output_norm", "ln_f"),
        _rule("attn_norm", "input_layernorm", "hidden"),
        _rule(
            "attn_qkv", "self_attention.query_key_value", "qkv", "hidden", transform="ungroup_qkv"
        ),
        _rule("attn_output", "self_attention.dense", "hidden", "hidden"),
        _rule("ffn_norm", "post_attention_layernorm", "hidden"),
        _rule("ffn_up", "mlp.dense_h_to_4h", "ff", "hidden"),
        _rule("ffn_down", "mlp.dense_4h_to_h", "hidden", "ff"),
    ),
)
