"""Llama 1 to 3, Mistral and what shares their layout (``general.architecture`` = ``llama``).

Rotary pairs are adjacent in llama.cpp, so query and key rows are permuted. Llama 3's rope scaling
becomes the ``rope_freqs`` tensor: one divisor per frequency.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule, Vocabulary
from ._config import rope_parameters
from ._record import Architecture, Config, ExtraTensor, TensorRule, head_dim, heads


def _extra_keys(config: Config) -> list[KeyValue]:
    return [
        u32("llama.vocab_size", config["vocab_size"]),
        u32("llama.rope.dimension_count", head_dim(config)),
    ]


def _rope_freqs(config: Config) -> np.ndarray | None:
    """Return float32 [head_dim / 2] divisors of the rotary frequencies, for rope type llama3.

    Long wavelengths are divided by ``factor``, short ones not at all, those between smoothly.
    """
    rope = rope_parameters(config)
    if str(rope.get("rope_type")).lower() != "llama3":
        return None
    one, dim = np.float32(1), head_dim(config)
    factor = np.float32(rope.get("factor", 8.0))
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    context = rope.get("original_max_position_embeddings", 8192)
    # The reference multiplies by float32 reciprocals; dividing would change the last bit.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(np.float64(rope.get("rope_theta", 10000.0)), exponents.astype(np.float64))
    frequencies = one / powers.astype(np.float32)
    wavelengths = one / frequencies * np.float32(2 * np.pi)
    smooth = one / wavelengths * np.float32(context) - np.float32(low)
    with np.errstate(divide="ignore", invalid="ignore"):  # low == high leaves nothing between
        smooth /= np.float32(high - low)
        divisors = one / ((one - smooth) / factor + smooth)
    divisors[wavelengths > np.float32(context / low)] = factor
    divisors[wavelengths < np.float32(context / high)] = one
    return divisors


def _adjust_vocabulary(vocabulary: Vocabulary, config: Config) -> Vocabulary:
    """Two families are known by their vocabulary size alone: Code Llama and small Granite."""
    specials, size = vocabulary.specials, config["vocab_size"]
    if size == 32016 and "eot" not in specials.ids:
        specials = replace(specials, ids={**specials.ids, "eot": 32010})
    if size == 49152:
        specials = replace(specials, add={**specials.add, "bos": False})
    return replace(vocabulary, specials=specials)


_LAYER = "model.layers.{n}"

ARCHITECTURE = Architecture(
    name="llama",
    classes=("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "LlamaModel"),
    headless=("LlamaModel",),
    rope="norm",
    defaults={
        "llama": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": heads,
            "head_dim": head_dim,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
        "mistral": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": head_dim,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
    },
    extra_keys=_extra_keys,
    extra_tensors=(ExtraTensor("rope_freqs.weight", _rope_freqs),),
    tokenizer=TokenizerRule(kinds=("spm", "spm_json", "bpe"), space_prefix=True),
    adjust_vocabulary=_adjust_vocabulary,
    tensors=(
        TensorRule("token_embd", "model.embed_tokens", ("vocab", "hidden")),
        TensorRule("output", "lm_head", ("vocab", "hidden"), optional=True),
        TensorRule("output_norm", "model.norm", ("hidden",)),
        TensorRule("blk.{n}.attn_norm", f"{_LAYER}.input_layernorm", ("hidden",)),
        TensorRule(
            "blk.{n}.attn_q",
            f"{_LAYER}.self_attn.q_proj",
            ("q", "hidden"),
            transform="permute_q",
            bias="maybe",
        ),
        TensorRule(
            "blk.{n}.attn_k",
            f"{_LAYER}.self_attn.k_proj",
            ("kv", "hidden"),
            transform="permute_k",
            bias="maybe",
        ),
        TensorRule("blk.{n}.attn_v", f"{_LAYER}.self_attn.v_proj", ("kv", "hidden"), bias="maybe"),
        TensorRule(
            "blk.{n}.attn_output", f"{_LAYER}.self_attn.o_proj", ("hidden", "q"), bias="maybe"
        ),
        TensorRule("blk.{n}.ffn_norm", f"{_LAYER}.post_attention_layernorm", ("hidden",)),
        TensorRule("blk.{n}.ffn_gate", f"{_LAYER}.mlp.gate_proj", ("ff", "hidden"), bias="maybe"),
        TensorRule("blk.{n}.ffn_up", f"{_LAYER}.mlp.up_proj", ("ff", "hidden"), bias="maybe"),
        TensorRule("blk.{n}.ffn_down", f"{_LAYER}.mlp.down_proj", ("hidden", "ff"), bias="maybe"),
    ),
)
