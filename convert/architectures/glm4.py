"""GLM-4-0414 and Z1 (``general.architecture`` = ``glm4``): norms on both sides, partial rotary.

Rotary pairs are adjacent on both sides. Special tokens are known by their text.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, NORMS, attention
from ._config import rope_parameters
from ._glm_like import special_tokens
from ._record import Architecture, Config, TensorRule, head_dim

_END, _USER = "<|endoftext|>", "<|user|>"
_SPECIALS = {"eos": _END, "eot": _USER, "unk": _END, "bos": _END}


def _extra_keys(config: Config) -> list[KeyValue]:
    share = rope_parameters(config).get("partial_rotary_factor", 0.5)
    return [u32("glm4.rope.dimension_count", int(head_dim(config) * share))]


ARCHITECTURE = Architecture(
    name="glm4",
    classes=("Glm4ForCausalLM",),
    rope="norm",
    defaults={
        "glm4": {
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1.5625e-07,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    extra_keys=_extra_keys,
    adjust_vocabulary=special_tokens(_SPECIALS),
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        *NORMS,
        TensorRule("blk.{n}.post_attention_norm", f"{LAYER}.post_self_attn_layernorm", ("hidden",)),
        TensorRule("blk.{n}.post_ffw_norm", f"{LAYER}.post_mlp_layernorm", ("hidden",)),
        *attention(out_bias="no"),
        TensorRule("blk.{n}.ffn_up", f"{LAYER}.mlp.gate_up_proj", ("2ff", "hidden")),
        TensorRule("blk.{n}.ffn_down", f"{LAYER}.mlp.down_proj", ("hidden", "ff")),
    ),
)
