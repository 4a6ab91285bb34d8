"""GPT-NeoX and Pythia (``general.architecture`` = ``gptneox``): parallel residual, partial rotary.

The fused q|k|v comes head by head (q, k, v of one head, then of the next) and is brought into three
blocks.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, boolean, u32
from ..tokenizers import TokenizerRule
from ._config import rope_parameters
from ._record import Architecture, Config, TensorRule, head_dim
from ._restore import Stored

_LAYER = "gpt_neox.layers.{n}"


def _extra_keys(config: Config) -> list[KeyValue]:
    share = config.get("rotary_pct", rope_parameters(config).get("partial_rotary_factor"))
    return [
        u32("gptneox.rope.dimension_count", int(share * head_dim(config))),
        boolean("gptneox.use_parallel_residual", config["use_parallel_residual"]),
    ]


def _restore(stored: Stored) -> dict[str, object]:
    return {
        "rotary_pct": stored.whole("rope.dimension_count") / stored.head,
        "use_parallel_residual": bool(stored.keys.get("use_parallel_residual", True)),
        "attention_bias": stored.has("blk.0.attn_qkv.bias"),
    }


def _rule(gguf: str, hf: str, *shape: str, transform: str = "", bias: str = "yes") -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.{hf}", shape, transform, bias=bias)


ARCHITECTURE = Architecture(
    name="gptneox",
    classes=("GPTNeoXForCausalLM",),
    prefix="gpt_neox.",
    rope="neox",
    defaults={
        "gpt_neox": {
            "vocab_size": 50432,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "rope_theta": 10000.0,
            "partial_rotary_factor": lambda config: config.get("rotary_pct", 0.25),
        },
    },
    extra_keys=_extra_keys,
    key_order=(
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "rope.dimension_count",
        "attention.head_count",
        "use_parallel_residual",
        "attention.layer_norm_epsilon",
    ),
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        TensorRule("token_embd", "gpt_neox.embed_in", ("vocab", "hidden")),
        TensorRule("output", "embed_out", ("vocab", "hidden"), optional=True),
        TensorRule("output_norm", "gpt_neox.final_layer_norm", ("hidden",), bias="yes"),
        _rule("attn_norm", "input_layernorm", "hidden"),
        _rule("ffn_norm", "post_attention_layernorm", "hidden"),
        _rule(
            "attn_qkv", "attention.query_key_value", "qkv", "hidden",
            transform="ungroup_qkv", bias="maybe",
        ),
        _rule("attn_output", "attention.dense", "hidden", "hidden", bias="maybe"),
        _rule("ffn_up", "mlp.dense_h_to_4h", "ff", "hidden"),
        _rule("ffn_down", "mlp.dense_4h_to_h", "hidden", "ff"),
    ),
)  # fmt: skip
