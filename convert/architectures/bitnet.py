"""BitNet b1.58 (``general.architecture`` = ``bitnet``): ternary weights, norms inside the layers.

The matrices are brought to the three values that the model computes with. The head is the
embedding. Rotary embedding in halves.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, f32, string
from ..tokenizers import TokenizerRule
from ._blocks import EMBEDDING, LAYER, NORMS, attention, gated_mlp
from ._record import Architecture, Config, TensorRule

_ACTIVATION = "silu"


def _extra_keys(config: Config) -> list[KeyValue]:
    if config.get("hidden_act", _ACTIVATION) != _ACTIVATION:
        raise UnsupportedError(
            f"config.json: hidden_act is {config['hidden_act']!r}, llama.cpp's BitNet has "
            f"{_ACTIVATION!r} and would answer nonsense"
        )
    scaling = "bitnet.rope.scaling"
    return [string(f"{scaling}.type", "linear"), f32(f"{scaling}.factor", 1.0)]


ARCHITECTURE = Architecture(
    name="bitnet",
    classes=("BitnetForCausalLM", "BitNetForCausalLM"),
    rope="neox",
    defaults={
        "bitnet": {
            "vocab_size": 128256,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_hidden_layers": 30,
            "num_attention_heads": 20,
            "num_key_value_heads": 5,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
        },
    },
    drop_tied_head=True,
    extra_keys=_extra_keys,
    tokenizer=TokenizerRule(kinds=("spm", "bpe")),
    tensors=(
        EMBEDDING,
        TensorRule("output_norm", "model.norm", ("hidden",)),
        *NORMS,
        *(
            replace(rule, transform="ternary")
            for rule in (*attention(bias="no"), *gated_mlp())
        ),
        TensorRule("blk.{n}.attn_sub_norm", f"{LAYER}.self_attn.attn_sub_norm", ("hidden",)),
        TensorRule("blk.{n}.attn_sub_norm", f"{LAYER}.self_attn.inner_attn_ln", ("hidden",)),
        TensorRule("blk.{n}.ffn_sub_norm", f"{LAYER}.mlp.ffn_sub_norm", ("ff",)),
        TensorRule("blk.{n}.ffn_sub_norm", f"{LAYER}.mlp.ffn_layernorm", ("ff",)),
    ),
    notes="the mean magnitudes are summed exactly, llama.cpp's converter rounds them; not the 2B "
    "with a squared ReLU",
)  # fmt: skip
