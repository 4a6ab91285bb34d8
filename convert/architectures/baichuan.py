"""Baichuan 1 and 2 (``general.architecture`` = ``baichuan``): Llama with a fused q|k|v.

The 7B has rotary embeddings (pairs adjacent in llama.cpp, so rows are permuted), the 13B alibi;
llama.cpp tells them by the number of layers.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, string, u32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, NORMS, gated_mlp
from ._record import Architecture, Config, TensorRule, head_dim


def _extra_keys(config: Config) -> list[KeyValue]:
    return [
        string("baichuan.tensor_data_layout", "Meta AI original pth"),
        u32("baichuan.rope.dimension_count", head_dim(config)),
    ]


ARCHITECTURE = Architecture(
    name="baichuan",
    classes=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    rope="norm",
    defaults={
        "baichuan": {
            "vocab_size": 125696,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "rms_norm_eps": 1e-6,
        },
    },
    extra_keys=_extra_keys,
    tokenizer=TokenizerRule(kinds=("spm",)),
    tensors=(
        *FRAME,
        *NORMS,
        TensorRule(
            ("blk.{n}.attn_q", "blk.{n}.attn_k", "blk.{n}.attn_v"),
            f"{LAYER}.self_attn.W_pack",
            ("qkv", "hidden"),
            "split_qkv_pairs",
        ),
        TensorRule("blk.{n}.attn_output", f"{LAYER}.self_attn.o_proj", ("hidden", "q")),
        *gated_mlp(),
    ),
    notes="the head of Baichuan 2 is taken as it is, not normalised",
)
