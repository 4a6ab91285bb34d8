"""gpt-oss (``general.architecture`` = ``gpt-oss``): experts with biases, attention sinks.

The hub has expert matrices in MXFP4, taken as they are; in 16 bits they are stored [experts, in,
out] and transposed. Rows of gate and up alternate and are parted. Rotary embedding in halves.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, attention
from ._record import Architecture, Config, TensorRule
from ._restore import Stored, restored_rope

_EXPERTS = f"{LAYER}.mlp.experts"


def _extra_keys(config: Config) -> list[KeyValue]:
    return [
        u32("gpt-oss.attention.sliding_window", config["sliding_window"]),
        u32("gpt-oss.expert_feed_forward_length", config["intermediate_size"]),
    ]


def _rope(config: Config) -> dict[str, object] | None:
    """Return the rope settings of configurations that say nothing of rope."""
    if config.get("rope_scaling") or config.get("rope_theta"):
        return None
    return {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
        "rope_theta": 150000.0,
    }


def _restore(stored: Stored) -> dict[str, object]:
    own: dict[str, object] = {
        "sliding_window": stored.whole("attention.sliding_window"),
        "intermediate_size": stored.whole("expert_feed_forward_length"),
        "attention_bias": True,
    }
    scaling = restored_rope(stored).get("rope_scaling")
    return own | ({"rope_scaling": {**scaling, "truncate": False}} if scaling else {})


def _exact(gguf: str | tuple[str, ...], hf: str, shape: tuple[str, ...], how: str) -> TensorRule:
    return TensorRule(gguf, f"{_EXPERTS}.{hf}", shape, how, exact=True)


ARCHITECTURE = Architecture(
    name="gpt-oss",
    classes=("GptOssForCausalLM",),
    rope="neox",
    defaults={
        "gpt_oss": {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope,
            "sliding_window": 128,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
        },
    },
    quantized=("mxfp4",),
    extra_keys=_extra_keys,
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        TensorRule("blk.{n}.attn_norm", f"{LAYER}.input_layernorm", ("hidden",)),
        TensorRule("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm", ("hidden",)),
        *attention(bias="yes"),
        TensorRule("blk.{n}.attn_sinks.weight", f"{LAYER}.self_attn.sinks", ("heads",), exact=True),
        TensorRule(
            "blk.{n}.ffn_gate_inp",
            f"{LAYER}.mlp.router",
            ("experts", "hidden"),
            bias="yes",
            keep_f32=True,
        ),
        _exact("blk.{n}.ffn_down_exps.weight", "down_proj_{q}", (), "mxfp4"),
        _exact(
            ("blk.{n}.ffn_gate_exps.weight", "blk.{n}.ffn_up_exps.weight"),
            "gate_up_proj_{q}",
            (),
            "mxfp4_alternating_gate_up",
        ),
        _exact(
            "blk.{n}.ffn_down_exps.weight", "down_proj", ("experts", "ff", "hidden"), "transpose"
        ),
        _exact("blk.{n}.ffn_down_exps.bias", "down_proj_bias", ("experts", "hidden"), ""),
        _exact(
            ("blk.{n}.ffn_gate_exps.weight", "blk.{n}.ffn_up_exps.weight"),
            "gate_up_proj",
            ("experts", "hidden", "2ff"),
            "transpose_alternating_gate_up",
        ),
        _exact(
            ("blk.{n}.ffn_gate_exps.bias", "blk.{n}.ffn_up_exps.bias"),
            "gate_up_proj_bias",
            ("experts", "2ff"),
            "alternating_gate_up",
        ),
    ),
)
