"""EXAONE 4 (``general.architecture`` = ``exaone4``): norms after attention and MLP, q and k norms.

The 32B has a sliding window in three of four layers; rotary embedding in halves.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, booleans, u32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, attention, gated_mlp, head_norms
from ._config import layer_count
from ._llama_like import rope_freqs
from ._record import Architecture, Config, ExtraTensor, TensorRule, heads


def _local_layers(config: Config) -> list[bool]:
    """Return which layers have the window; empty: the configuration does not say."""
    if config.get("layer_types") is not None:
        return [kind == "sliding_attention" for kind in config["layer_types"]]
    pattern, count = config.get("sliding_window_pattern"), layer_count(config)
    if isinstance(pattern, str) and pattern:  # such as LLLG
        return [pattern[n % len(pattern)] == "L" for n in range(count)]
    if isinstance(pattern, int) and pattern:
        return [(n + 1) % pattern != 0 for n in range(count)]
    return []


def _extra_keys(config: Config) -> list[KeyValue]:
    keys = [u32("exaone4.vocab_size", config["vocab_size"])]
    if config.get("sliding_window") is None:
        return keys
    keys.append(u32("exaone4.attention.sliding_window", config["sliding_window"]))
    local = _local_layers(config)
    if local:
        keys.append(booleans("exaone4.attention.sliding_window_pattern", local))
    return keys


ARCHITECTURE = Architecture(
    name="exaone4",
    classes=("Exaone4ForCausalLM",),
    rope="neox",
    defaults={
        "exaone4": {
            "vocab_size": 102400,
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
    },
    extra_keys=_extra_keys,
    extra_tensors=(ExtraTensor("rope_freqs.weight", rope_freqs),),
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        TensorRule("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm", ("hidden",)),
        TensorRule("blk.{n}.post_ffw_norm", f"{LAYER}.post_feedforward_layernorm", ("hidden",)),
        *attention(),
        *head_norms(),
        *gated_mlp(),
    ),
)
