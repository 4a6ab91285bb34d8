"""Command R7B and Command A (``general.architecture`` = ``cohere2``).

Three of four layers have a sliding window, the others no rope. Rotary pairs are adjacent on both
sides.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, f32, string, u32
from ..tokenizers import TokenizerRule
from ._blocks import EMBEDDING, LAYER, attention, gated_mlp
from ._record import Architecture, Config, TensorRule
from ._restore import Stored


def _extra_keys(config: Config) -> list[KeyValue]:
    dim = config["hidden_size"] // config["num_attention_heads"]
    return [
        f32("cohere2.logit_scale", config["logit_scale"]),
        u32("cohere2.attention.sliding_window", config["sliding_window"]),
        u32("cohere2.vocab_size", config["vocab_size"]),
        u32("cohere2.rope.dimension_count", int(config["rotary_pct"] * dim)),
        string("cohere2.rope.scaling.type", "none"),
    ]


def _restore(stored: Stored) -> dict[str, object]:
    heads, hidden = stored.whole("attention.head_count"), stored.whole("embedding_length")
    return {
        "logit_scale": stored.number("logit_scale"),
        "sliding_window": stored.whole("attention.sliding_window"),
        "rotary_pct": stored.whole("rope.dimension_count") * heads / hidden,
        "pad_token_id": None,
    }


ARCHITECTURE = Architecture(
    name="cohere2",
    classes=("Cohere2ForCausalLM",),
    rope="norm",
    defaults={
        "cohere2": {
            "vocab_size": 256000,
            "hidden_size": 8192,
            "intermediate_size": 22528,
            "num_hidden_layers": 40,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rotary_pct": 1.0,
            "sliding_window": 4096,
            "logit_scale": 0.0625,
            "tie_word_embeddings": True,
        },
    },
    drop_tied_head=True,
    extra_keys=_extra_keys,
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        EMBEDDING,
        TensorRule("output_norm", "model.norm", ("hidden",)),
        TensorRule("blk.{n}.attn_norm", f"{LAYER}.input_layernorm", ("hidden",)),
        *attention(bias="no"),
        *gated_mlp(),
    ),
)
