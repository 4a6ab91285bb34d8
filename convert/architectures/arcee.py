"""Arcee AFM (``general.architecture`` = ``arcee``): Llama with a squared ReLU instead of a gate.

Rotary pairs are adjacent in llama.cpp, so query and key rows are permuted.
"""

from __future__ import annotations

from ..gguf.values import KeyValue
from ..tokenizers import TokenizerRule
from ._bert_like import pooling_keys
from ._blocks import FRAME, NORMS, attention, ungated_mlp
from ._llama_like import adjust_vocabulary, extra_keys, rope_freqs
from ._record import Architecture, Config, ExtraTensor, head_dim

_llama_keys = extra_keys("arcee")


def _extra_keys(config: Config) -> list[KeyValue]:
    return [*_llama_keys(config), *pooling_keys("arcee", config)]


ARCHITECTURE = Architecture(
    name="arcee",
    classes=("ArceeForCausalLM",),
    rope="norm",
    defaults={
        "arcee": {
            "vocab_size": 32000,
            "hidden_size": 2560,
            "intermediate_size": 18432,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": lambda config: config["num_attention_heads"],
            "head_dim": head_dim,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        },
    },
    extra_keys=_extra_keys,
    extra_tensors=(ExtraTensor("rope_freqs.weight", rope_freqs),),
    tokenizer=TokenizerRule(kinds=("spm", "spm_json", "bpe"), space_prefix=True),
    adjust_vocabulary=adjust_vocabulary,
    tensors=(*FRAME, *NORMS, *attention(permuted=True), *ungated_mlp(bias="maybe")),
)
