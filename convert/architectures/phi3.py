"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini (``general.architecture`` = ``phi3``).

q|k|v and gate|up stay fused. The long-context variants carry two sets of rotary divisors; which is
used depends on the length of the context.
"""

from __future__ import annotations

import math

import numpy as np

from ...errors import ConfigError, UnsupportedError
from ..gguf.values import KeyValue, f32, u32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, NORMS
from ._config import rope_parameters
from ._record import Architecture, Config, ExtraTensor, TensorRule
from ._restore import Stored, short


def _rotated(config: Config) -> int:
    """Return the number of rotated dims of a head."""
    share = rope_parameters(config).get("partial_rotary_factor", 1.0)
    return int(share * config["hidden_size"]) // int(config["num_attention_heads"])


def _original_context(config: Config) -> int:
    given = rope_parameters(config).get("original_max_position_embeddings")
    return int(given or config["original_max_position_embeddings"])


def _extra_keys(config: Config) -> list[KeyValue]:
    return [
        u32("phi3.rope.scaling.original_context_length", _original_context(config)),
        u32("phi3.rope.dimension_count", _rotated(config)),
        # no window at all is what tells Phi-4 from the others
        u32("phi3.attention.sliding_window", config.get("sliding_window") or 0),
    ]


def _first_keys(config: Config) -> list[KeyValue]:
    """Return the factor on attention logits that goes with a stretched context."""
    rope = rope_parameters(config)
    if not rope.get("long_factor"):
        return []
    original, kind = _original_context(config), str(rope.get("rope_type")).lower()
    scale = config["max_position_embeddings"] / original
    if kind in ("su", "longrope"):
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    elif kind == "yarn":
        factor = 0.1 * math.log(scale) + 1.0 if scale > 1 else 1.0
    else:
        raise UnsupportedError(f"config.json: rope type {kind!r} with long and short factors")
    return [f32("phi3.rope.scaling.attn_factor", factor)]


def _factors(name: str) -> ExtraTensor:
    def build(config: Config) -> np.ndarray | None:
        rope = rope_parameters(config)
        if not rope.get("long_factor"):
            return None
        factors, want = rope.get(f"{name}_factor") or [], _rotated(config) // 2
        if len(factors) != want:
            raise ConfigError(
                f"config.json: {name}_factor has {len(factors)} entries, {want} are needed"
            )
        return np.array(factors, np.float32)

    return ExtraTensor(f"rope_factors_{name}.weight", build)


def _restore(stored: Stored) -> dict[str, object]:
    heads, hidden = stored.whole("attention.head_count"), stored.whole("embedding_length")
    rotated = stored.whole("rope.dimension_count")
    own: dict[str, object] = {
        "original_max_position_embeddings": stored.whole("rope.scaling.original_context_length"),
        "partial_rotary_factor": rotated * heads / hidden,
        "sliding_window": stored.whole("attention.sliding_window", 0) or None,
        "pad_token_id": None,  # the class has one that small vocabularies do not
    }
    if stored.has("rope_factors_long.weight", "rope_factors_short.weight"):
        factors = {
            f"{name}_factor": [short(x) for x in stored.read(f"rope_factors_{name}.weight")]
            for name in ("long", "short")
        }
        own["rope_scaling"] = {"rope_type": "longrope", **factors}
    return own


ARCHITECTURE = Architecture(
    name="phi3",
    classes=("Phi3ForCausalLM",),
    rope="neox",
    defaults={
        "phi3": {
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
    },
    extra_keys=_extra_keys,
    first_keys=_first_keys,
    extra_tensors=(_factors("long"), _factors("short")),
    key_order=(
        "context_length",
        "rope.scaling.original_context_length",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "general.file_type",
        "attention.sliding_window",
    ),
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("spm", "bpe"), plain_added=True),
    tensors=(
        *FRAME,
        *NORMS,
        TensorRule("blk.{n}.attn_qkv", f"{LAYER}.self_attn.qkv_proj", ("qkv", "hidden")),
        TensorRule("blk.{n}.attn_output", f"{LAYER}.self_attn.o_proj", ("hidden", "q")),
        TensorRule("blk.{n}.ffn_up", f"{LAYER}.mlp.gate_up_proj", ("2ff", "hidden")),
        TensorRule("blk.{n}.ffn_down", f"{LAYER}.mlp.down_proj", ("hidden", "ff")),
    ),
)
