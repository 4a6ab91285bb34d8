"""Command R and Aya (``general.architecture`` = ``command-r``): parallel block, scaled logits.

Rotary pairs are adjacent on both sides. The larger model norms queries and keys head by head.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, f32, string, u32
from ..tokenizers import TokenizerRule
from ._blocks import EMBEDDING, LAYER, attention, gated_mlp
from ._record import Architecture, Config, TensorRule
from ._restore import Stored


def _extra_keys(config: Config) -> list[KeyValue]:
    # the hub's max_position_embeddings is smaller than what the model was trained on
    context = config.get("model_max_length") or config["max_position_embeddings"]
    return [
        u32("command-r.context_length", context),
        f32("command-r.logit_scale", config["logit_scale"]),
        string("command-r.rope.scaling.type", "none"),
    ]


def _head_norm(which: str, heads: str) -> TensorRule:
    name = f"{LAYER}.self_attn.{which}_norm"
    return TensorRule(f"blk.{{n}}.attn_{which}_norm", name, (heads, "head"), needs="use_qk_norm")


def _restore(stored: Stored) -> dict[str, object]:
    return {
        "logit_scale": stored.number("logit_scale"),
        "use_qk_norm": stored.has("blk.0.attn_q_norm.weight"),
        "pad_token_id": None,
    }


ARCHITECTURE = Architecture(
    name="command-r",
    classes=("CohereForCausalLM",),
    rope="norm",
    defaults={
        "cohere": {
            "vocab_size": 256000,
            "hidden_size": 8192,
            "intermediate_size": 22528,
            "num_hidden_layers": 40,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "rope_theta": 500000.0,
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
        *attention(bias="maybe"),
        _head_norm("q", "heads"),
        _head_norm("k", "kv_heads"),
        *gated_mlp(),
    ),
)
