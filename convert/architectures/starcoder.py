"""StarCoder and SantaCoder (``general.architecture`` = ``starcoder``): one key-value head.

Learned positions, LayerNorm with biases, q|k|v fused.
"""

from __future__ import annotations

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._record import Architecture, Config, TensorRule

_LAYER = "transformer.h.{n}"


def _extra_keys(config: Config) -> list[KeyValue]:
    if not config["multi_query"]:
        raise UnsupportedError("config.json: multi_query is off, llama.cpp knows no such StarCoder")
    return [
        u32("starcoder.feed_forward_length", 4 * config["hidden_size"]),
        u32("starcoder.attention.head_count_kv", 1),
    ]


def _rule(gguf: str, hf: str, *shape: str) -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.{hf}", shape, bias="yes")


ARCHITECTURE = Architecture(
    name="starcoder",
    classes=("GPTBigCodeForCausalLM",),
    prefix="transformer.",
    rope="",
    defaults={
        "gpt_bigcode": {
            "vocab_size": 50257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "multi_query": True,
            "num_key_value_heads": lambda config: 1,
            "tie_word_embeddings": True,
        },
    },
    synonyms={"n_embd": "hidden_size", "n_head": "num_attention_heads"},
    sizes=lambda config: {
        "ff": config.get("n_inner") or 4 * config["hidden_size"],
        "positions": config["n_positions"],
    },
    ignored=r"\.attn\.(masked_)?bias$",
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
        TensorRule("token_embd", "transformer.wte", ("vocab", "hidden")),
        TensorRule("position_embd", "transformer.wpe", ("positions", "hidden"), keep_f32=True),
        TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True),
        TensorRule("output_norm", "transformer.ln_f", ("hidden",), bias="yes"),
        _rule("attn_norm", "ln_1", "hidden"),
        _rule("attn_qkv", "attn.c_attn", "qkv", "hidden"),
        _rule("attn_output", "attn.c_proj", "hidden", "hidden"),
        _rule("ffn_norm", "ln_2", "hidden"),
        _rule("ffn_up", "mlp.c_fc", "ff", "hidden"),
        _rule("ffn_down", "mlp.c_proj", "hidden", "ff"),
    ),
)
