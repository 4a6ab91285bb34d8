"""Nemotron and Minitron (``general.architecture`` = ``nemotron``): LayerNorm, squared ReLU.

Hugging Face stores norm weights minus one; llama.cpp wants them whole. Partial rotary, in halves.
"""

from __future__ import annotations

from dataclasses import replace

from ..gguf.values import KeyValue, f32, string, u32
from ..tokenizers import TokenizerRule, Vocabulary
from ..tokenizers.vocabulary import ID_KEYS
from ._blocks import EMBEDDING, HEAD, LAYER, attention, ungated_mlp
from ._config import rope_parameters
from ._record import Architecture, Config, TensorRule


def _extra_keys(config: Config) -> list[KeyValue]:
    rope, width = rope_parameters(config), config["hidden_size"]
    rotated = int(rope["partial_rotary_factor"] * width) // config["num_attention_heads"]
    keys = [
        u32("nemotron.vocab_size", config["vocab_size"]),
        f32("nemotron.attention.layer_norm_epsilon", config["norm_eps"]),
        u32("nemotron.rope.dimension_count", rotated),
    ]
    factor = config.get("factor") or rope.get("factor")
    if factor is None:
        return [*keys, string("nemotron.rope.scaling.type", "none")]
    scaling = "nemotron.rope.scaling"
    return [*keys, string(f"{scaling}.type", "linear"), f32(f"{scaling}.factor", factor)]


def _adjust_vocabulary(vocabulary: Vocabulary, config: Config) -> Vocabulary:
    pad, unknown = (u32(ID_KEYS[role], n) for role, n in (("pad", 0), ("unk", 1)))
    return replace(vocabulary, extra=(*vocabulary.extra, pad, unknown))


def _norm(gguf: str, hf: str) -> tuple[TensorRule, TensorRule]:
    return (
        TensorRule(f"{gguf}.weight", f"{hf}.weight", ("hidden",), "plus_one", exact=True),
        TensorRule(f"{gguf}.bias", f"{hf}.bias", ("hidden",), exact=True),
    )


ARCHITECTURE = Architecture(
    name="nemotron",
    classes=("NemotronForCausalLM",),
    rope="neox",
    defaults={
        "nemotron": {
            "vocab_size": 256000,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 32,
            "num_attention_heads": 48,
            "num_key_value_heads": None,
            "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
            "max_position_embeddings": 4096,
            "norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    extra_keys=_extra_keys,
    adjust_vocabulary=_adjust_vocabulary,
    tokenizer=TokenizerRule(kinds=("spm",)),
    tensors=(
        EMBEDDING,
        HEAD,
        *_norm("output_norm", "model.norm"),
        *_norm("blk.{n}.attn_norm", f"{LAYER}.input_layernorm"),
        *_norm("blk.{n}.ffn_norm", f"{LAYER}.post_attention_layernorm"),
        *attention(),
        *ungated_mlp(bias="maybe"),
    ),
)
