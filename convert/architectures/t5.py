"""T5, Flan-T5, mT5 and UMT5 (``general.architecture`` = ``t5``): encoder and decoder.

Positions are relative, by buckets that (mostly) the first layer of each side holds.
"""

from __future__ import annotations

from collections.abc import Collection

from ..gguf.values import KeyValue, f32, u32
from ..tokenizers import TokenizerRule
from ._config import layer_count
from ._record import Architecture, Config, TensorRule


def _decoder_layers(config: Config) -> int:
    given = config.get("num_decoder_layers")
    return layer_count(config) if given is None else int(given)


def _deeper_decoder(config: Config, names: Collection[str]) -> int:
    """Return how many layers the decoder has beyond the encoder's."""
    return max(0, _decoder_layers(config) - layer_count(config))


def _layer_tags(config: Config, layer: int) -> tuple[str, ...]:
    encoder = ("encoder",) if layer < layer_count(config) else ()
    return (*encoder, "decoder") if layer < _decoder_layers(config) else encoder


def _extra_keys(config: Config) -> list[KeyValue]:
    numbers = {
        "context_length": config.get("n_positions") or 512,
        "feed_forward_length": config["d_ff"],
        "block_count": layer_count(config),
        "decoder_block_count": config.get("num_decoder_layers"),
        "attention.key_length": config["d_kv"],
        "attention.value_length": config["d_kv"],
        "attention.relative_buckets_count": config["relative_attention_num_buckets"],
        "decoder_start_token_id": config.get("decoder_start_token_id") or 0,
    }
    return [
        *(u32(f"t5.{key}", n) for key, n in numbers.items() if n is not None),
        f32("t5.attention.layer_norm_rms_epsilon", config["layer_norm_epsilon"]),
    ]


def _sizes(config: Config) -> dict[str, int]:
    return {
        "inner": config["num_heads"] * config["d_kv"],
        "ff": config["d_ff"],
        "buckets": config["relative_attention_num_buckets"],
    }


def _side(to: str, side: str) -> tuple[TensorRule, ...]:
    """Return the layers of the encoder or the decoder."""
    block = f"{side}.block.{{n}}.layer"
    mlp = 2 if side == "decoder" else 1

    def rule(gguf: str, hf: str, *shape: str, optional: bool = False) -> TensorRule:
        return TensorRule(
            f"{to}.blk.{{n}}.{gguf}", f"{block}.{hf}", shape, layers=side, optional=optional
        )

    into = ("inner", "hidden")

    def attention(at: str, pre: str) -> tuple[TensorRule, ...]:
        return tuple(
            rule(f"{pre}_{p}", f"{at}.{p}", *(("hidden", "inner") if p == "o" else into))
            for p in "qkvo"
        )

    cross = (
        rule("cross_attn_norm", "1.layer_norm", "hidden"),
        *attention("1.EncDecAttention", "cross_attn"),
    )
    return (
        TensorRule(f"{to}.output_norm", f"{side}.final_layer_norm", ("hidden",)),
        rule("attn_norm", "0.layer_norm", "hidden"),
        *attention("0.SelfAttention", "attn"),
        rule(
            "attn_rel_b", "0.SelfAttention.relative_attention_bias", "buckets", "heads",
            optional=True,
        ),
        *(cross if side == "decoder" else ()),
        rule("ffn_norm", f"{mlp}.layer_norm", "hidden"),
        rule("ffn_gate", f"{mlp}.DenseReluDense.wi_0", "ff", "hidden", optional=True),
        rule("ffn_up", f"{mlp}.DenseReluDense.wi_1", "ff", "hidden"),
        rule("ffn_up", f"{mlp}.DenseReluDense.wi", "ff", "hidden"),
        rule("ffn_down", f"{mlp}.DenseReluDense.wo", "hidden", "ff"),
    )  # fmt: skip


_COMMON = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
}

ARCHITECTURE = Architecture(
    name="t5",
    classes=(
        "T5ForConditionalGeneration",
        "T5WithLMHeadModel",
        "MT5ForConditionalGeneration",
        "UMT5ForConditionalGeneration",
    ),
    prefix="",
    rope="",
    defaults={
        "t5": {**_COMMON, "tie_word_embeddings": True},
        "mt5": {**_COMMON, "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
        "umt5": {**_COMMON, "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    },
    synonyms={"d_model": "hidden_size", "num_heads": "num_attention_heads"},
    sizes=_sizes,
    layer_tags=_layer_tags,
    prediction_layers=_deeper_decoder,
    extra_keys=_extra_keys,
    key_order=(
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "decoder_block_count",
        "attention.head_count",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_epsilon",
        "attention.relative_buckets_count",
        "attention.layer_norm_rms_epsilon",
        "decoder_start_token_id",
        "general.file_type",
    ),
    tokenizer=TokenizerRule(kinds=("unigram", "spm")),
    tensors=(
        TensorRule("token_embd", "shared", ("vocab", "hidden")),
        TensorRule("token_embd", "encoder.embed_tokens", ("vocab", "hidden"), optional=True),
        TensorRule("token_embd", "decoder.embed_tokens", ("vocab", "hidden"), optional=True),
        TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True),
        *_side("enc", "encoder"),
        *_side("dec", "decoder"),
    ),
)
