"""OLMo 2 and 3 (``general.architecture`` = ``olmo2``): norms after attention and MLP only.

Queries and keys are normed over all heads together. OLMo 3 has a sliding window in three of four
layers.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, booleans, u32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, attention, gated_mlp, head_norms
from ._config import layer_count
from ._record import Architecture, Config, Default, TensorRule
from ._restore import Stored


def _extra_keys(config: Config) -> list[KeyValue]:
    if "sliding_window" not in config:
        return []
    kinds = config.get("layer_types")
    local = (
        [kind == "sliding_attention" for kind in kinds]
        if kinds is not None
        else [(n + 1) % 4 != 0 for n in range(layer_count(config))]
    )
    key = "olmo2.attention.sliding_window_pattern"
    return [
        u32("olmo2.attention.sliding_window", config["sliding_window"]),
        booleans(key, local),
    ]


def _restore(stored: Stored) -> dict[str, object]:
    if "attention.sliding_window" not in stored.keys:
        return {"attention_bias": stored.has("blk.0.attn_q.bias")}
    local = stored.keys.get("attention.sliding_window_pattern")
    kinds = [
        "sliding_attention" if on else "full_attention" for on in ([] if local is None else local)
    ]
    return {
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "sliding_window": stored.whole("attention.sliding_window"),
        **({"layer_types": kinds} if kinds else {}),
        "attention_bias": stored.has("blk.0.attn_q.bias"),
        "rope_local_base_freq": ...,
    }


_COMMON: dict[str, Default] = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}

ARCHITECTURE = Architecture(
    name="olmo2",
    classes=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    rope="neox",
    defaults={
        "olmo2": {**_COMMON, "rope_theta": 10000.0},
        "olmo3": {
            **_COMMON,
            "rope_theta": 500000.0,
            "rope_local_base_freq": lambda config: config["rope_theta"],
            "sliding_window": 4096,
        },
    },
    extra_keys=_extra_keys,
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        TensorRule("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm", ("hidden",)),
        TensorRule("blk.{n}.post_ffw_norm", f"{LAYER}.post_feedforward_layernorm", ("hidden",)),
        *attention(),
        *head_norms("q", "kv"),
        *gated_mlp(),
    ),
)
