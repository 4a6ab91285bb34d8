"""Falcon 7B, 40B and 180B (``general.architecture`` = ``falcon``): parallel attention and MLP.

The fused q|k|v comes group by group (query heads, then their key and value) and is brought into
three blocks. The new decoder architecture has a norm of its own for the MLP.
"""

from __future__ import annotations

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, string, u32
from ..tokenizers import TokenizerRule
from ._record import Architecture, Config, TensorRule

_LAYER = "transformer.h.{n}"
_NEW = "new_decoder_architecture"


def _kv_heads(config: Config) -> int:
    """Return the number of key-value heads; multi-query models have one, whatever is given."""
    if config.get("multi_query") and not config.get(_NEW):
        return 1
    return int(config.get("num_kv_heads") or config["num_attention_heads"])


def _extra_keys(config: Config) -> list[KeyValue]:
    if config.get("alibi"):
        raise UnsupportedError("config.json: alibi positions, which llama.cpp's falcon has not")
    return [
        u32("falcon.context_length", 2048),
        string("falcon.tensor_data_layout", "jploski"),
        u32("falcon.feed_forward_length", 4 * config["hidden_size"]),
        u32("falcon.attention.head_count_kv", _kv_heads(config)),
    ]


def _sizes(config: Config) -> dict[str, int]:
    heads, kv_heads = config["num_attention_heads"], _kv_heads(config)
    dim = config["hidden_size"] // heads
    return {
        "kv_heads": kv_heads,
        "kv": kv_heads * dim,
        "qkv": (heads + 2 * kv_heads) * dim,
        "ff": config.get("ffn_hidden_size") or 4 * config["hidden_size"],
    }


def _norm(gguf: str, hf: str, needs: str = "") -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.{hf}", ("hidden",), bias="yes", needs=needs)


def _linear(gguf: str, hf: str, *shape: str, transform: str = "") -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.{hf}", shape, transform, bias="maybe")


ARCHITECTURE = Architecture(
    name="falcon",
    classes=("FalconForCausalLM", "RWForCausalLM"),
    prefix="transformer.",
    rope="neox",
    defaults={
        "falcon": {
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": lambda config: config.get("n_layer", 32),
            "num_attention_heads": lambda config: config.get("n_head", 71),
            "num_kv_heads": lambda config: config.get("n_head_kv", config["num_attention_heads"]),
            "layer_norm_epsilon": 1e-5,
            "multi_query": True,
            "new_decoder_architecture": False,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        },
    },
    sizes=_sizes,
    extra_keys=_extra_keys,
    key_order=(
        "context_length",
        "tensor_data_layout",
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
        TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True),
        TensorRule("output_norm", "transformer.ln_f", ("hidden",), bias="yes"),
        _norm("attn_norm", "input_layernorm", needs=f"!{_NEW}"),
        _norm("attn_norm", "ln_mlp", needs=_NEW),
        _norm("attn_norm_2", "ln_attn", needs=_NEW),
        _linear(
            "attn_qkv", "self_attention.query_key_value", "qkv", "hidden", transform="ungroup_qkv"
        ),
        _linear("attn_output", "self_attention.dense", "hidden", "hidden"),
        _linear("ffn_up", "mlp.dense_h_to_4h", "ff", "hidden"),
        _linear("ffn_down", "mlp.dense_4h_to_h", "hidden", "ff"),
    ),
    notes="without alibi",
)
