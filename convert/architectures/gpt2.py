"""GPT-2 (``general.architecture`` = ``gpt2``): learned positions, LayerNorm with biases.

Its linear layers are stored [in, out] and transposed here. Checkpoints of the hub lack the
``transformer.`` prefix and carry causal masks as buffers.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._record import Architecture, Config, TensorRule
from ._restore import Stored

_LAYER = "transformer.h.{n}"


def _extra_keys(config: Config) -> list[KeyValue]:
    return [
        u32("gpt2.context_length", config.get("n_ctx") or config["n_positions"]),
        u32("gpt2.feed_forward_length", 4 * config["hidden_size"]),
    ]


def _restore(stored: Stored) -> dict[str, object]:
    hidden, positions = stored.whole("embedding_length"), stored.whole("context_length")
    inner = stored.shapes.get("blk.0.ffn_up.weight", (4 * hidden,))[0]
    return {
        "intermediate_size": ...,
        "n_inner": None if inner == 4 * hidden else inner,
        "n_ctx": positions,
        "n_positions": stored.shapes.get("position_embd.weight", (positions,))[0],
    }


def _linear(gguf: str, hf: str, *shape: str) -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.{hf}", shape, "transpose", bias="yes")


ARCHITECTURE = Architecture(
    name="gpt2",
    classes=("GPT2LMHeadModel", "GPT2Model"),
    headless=("GPT2Model",),
    prefix="transformer.",
    rope="",
    defaults={
        "gpt2": {
            "vocab_size": 50257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
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
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_epsilon",
        "general.file_type",
    ),
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        TensorRule("token_embd", "transformer.wte", ("vocab", "hidden")),
        TensorRule("position_embd", "transformer.wpe", ("positions", "hidden"), keep_f32=True),
        TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True),
        TensorRule("output_norm", "transformer.ln_f", ("hidden",), bias="yes"),
        TensorRule("blk.{n}.attn_norm", f"{_LAYER}.ln_1", ("hidden",), bias="yes"),
        TensorRule("blk.{n}.ffn_norm", f"{_LAYER}.ln_2", ("hidden",), bias="yes"),
        _linear("attn_qkv", "attn.c_attn", "hidden", "qkv"),
        _linear("attn_output", "attn.c_proj", "hidden", "hidden"),
        _linear("ffn_up", "mlp.c_fc", "hidden", "ff"),
        _linear("ffn_down", "mlp.c_proj", "ff", "hidden"),
    ),
)
