"""ERNIE 4.5, dense (``general.architecture`` = ``ernie4_5``): Llama's layout.

Rotary pairs are adjacent on both sides.
"""

from __future__ import annotations

from dataclasses import replace

from ..gguf.values import boolean
from ..tokenizers import TokenizerRule, Vocabulary
from ._blocks import FRAME, NORMS, attention, gated_mlp
from ._record import Architecture, Config


def _adjust_vocabulary(vocabulary: Vocabulary, config: Config) -> Vocabulary:
    """Put the space prefix at the end."""
    if vocabulary.add_space_prefix is None:
        return vocabulary
    prefix = boolean("tokenizer.ggml.add_space_prefix", vocabulary.add_space_prefix)
    return replace(vocabulary, add_space_prefix=None, extra=(*vocabulary.extra, prefix))


ARCHITECTURE = Architecture(
    name="ernie4_5",
    classes=("Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM"),
    rope="norm",
    defaults={
        "ernie4_5": {
            "vocab_size": 103424,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 18,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
    },
    adjust_vocabulary=_adjust_vocabulary,
    tokenizer=TokenizerRule(kinds=("spm",), space_prefix=True),
    tensors=(*FRAME, *NORMS, *attention(), *gated_mlp(bias="maybe")),
)
