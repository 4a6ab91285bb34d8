"""StarCoder2 (``general.architecture`` = ``starcoder2``): LayerNorm, biases, no gate in the MLP."""

from __future__ import annotations

from ..tokenizers import TokenizerRule
from ._blocks import EMBEDDING, HEAD, LAYER, attention
from ._record import Architecture, TensorRule


def _rule(gguf: str, hf: str, *shape: str, bias: str) -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{LAYER}.{hf}", shape, bias=bias)


ARCHITECTURE = Architecture(
    name="starcoder2",
    classes=("Starcoder2ForCausalLM",),
    rope="neox",
    defaults={
        "starcoder2": {
            "vocab_size": 49152,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "norm_epsilon": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        },
    },
    restore=lambda stored: {"use_bias": stored.has("blk.0.attn_q.bias"), "sliding_window": None},
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        EMBEDDING,
        HEAD,
        TensorRule("output_norm", "model.norm", ("hidden",), bias="yes"),
        _rule("attn_norm", "input_layernorm", "hidden", bias="yes"),
        _rule("ffn_norm", "post_attention_layernorm", "hidden", bias="yes"),
        *attention(),
        _rule("ffn_up", "mlp.c_fc", "ff", "hidden", bias="maybe"),
        _rule("ffn_down", "mlp.c_proj", "hidden", "ff", bias="maybe"),
    ),
)
