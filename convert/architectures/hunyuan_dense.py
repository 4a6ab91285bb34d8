"""Hunyuan, dense (``general.architecture`` = ``hunyuan-dense``): q and k norms after the rope.

The context is stretched by a larger rope base; llama.cpp gets the base. Rotary embedding in halves.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, f32, string, u32
from ..tokenizers import TokenizerRule, Vocabulary
from ._blocks import FRAME, LAYER, NORMS, attention, gated_mlp
from ._config import rope_parameters
from ._record import Architecture, Config, TensorRule, head_dim, heads

_CONTEXT = 256 * 1024  # what the settings of all released models come to
_GIVEN = (32 * 1024, _CONTEXT)
_BASE = 10000.0


def _extra_keys(config: Config) -> list[KeyValue]:
    rope = rope_parameters(config)
    if rope.get("rope_type") != "dynamic":
        return []
    dim, base = head_dim(config), rope.get("rope_theta", _BASE)
    if base != _BASE or config["max_position_embeddings"] not in _GIVEN:
        raise UnsupportedError(
            "config.json: a dynamic rope other than that of the released Hunyuan models; how far "
            "its context reaches is not known"
        )
    scaling = "hunyuan-dense.rope.scaling"
    return [
        f32("hunyuan-dense.rope.freq_base", base * rope.get("alpha", 50) ** (dim / (dim - 2))),
        string(f"{scaling}.type", "none"),
        f32(f"{scaling}.factor", 1),
        u32(f"{scaling}.original_context_length", _CONTEXT),
        u32("hunyuan-dense.context_length", _CONTEXT),
    ]


def _adjust_vocabulary(vocabulary: Vocabulary, config: Config) -> Vocabulary:
    """The end is the one of ``eod_token_id``."""
    if config.get("eod_token_id") is None:
        return vocabulary
    end = u32("tokenizer.ggml.eos_token_id", config["eod_token_id"])
    return replace(vocabulary, extra=(*vocabulary.extra, end))


ARCHITECTURE = Architecture(
    name="hunyuan-dense",
    classes=("HunYuanDenseV1ForCausalLM",),
    rope="neox",
    defaults={
        "hunyuan_v1_dense": {
            "vocab_size": 290943,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": heads,
            "head_dim": None,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "eod_token_id": 3,
        },
    },
    drop_tied_head=True,
    extra_keys=_extra_keys,
    adjust_vocabulary=_adjust_vocabulary,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        *NORMS,
        *attention(),
        TensorRule("blk.{n}.attn_q_norm", f"{LAYER}.self_attn.query_layernorm", ("head",)),
        TensorRule("blk.{n}.attn_k_norm", f"{LAYER}.self_attn.key_layernorm", ("head",)),
        *gated_mlp(),
    ),
)
