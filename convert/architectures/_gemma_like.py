"""What the Gemma families share: norms stored minus one, no head of their own, their tokenizer.

A space is not put before the text; the key that says so comes last.
"""

from __future__ import annotations

from dataclasses import replace

from ..gguf.values import boolean
from ..tokenizers import TokenizerRule, Vocabulary
from ._blocks import LAYER
from ._record import Config, TensorRule
from ._restore import Stored

TOKENIZER = TokenizerRule(kinds=("spm", "spm_json"))
#: The head is always the embedding.
IGNORED = r"^(model\.)?lm_head\.weight$"
FINAL_NORM = TensorRule("output_norm", "model.norm", ("hidden",), "plus_one")
#: Gemma 2 and 3 have a norm on both sides of attention and MLP.
NORMS = tuple(
    TensorRule(f"blk.{{n}}.{gguf}", f"{LAYER}.{hf}", ("hidden",), "plus_one")
    for gguf, hf in (
        ("attn_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    )
)


def adjust_vocabulary(vocabulary: Vocabulary, config: Config) -> Vocabulary:
    """Say that no space is put before the text."""
    prefix = boolean("tokenizer.ggml.add_space_prefix", False)
    return replace(vocabulary, extra=(*vocabulary.extra, prefix))


def query_scale(stored: Stored, largest: int) -> int:
    """Return ``query_pre_attn_scalar``, which llama.cpp knows by the number of layers.

    Args:
        stored: the model.
        largest: layers of the model (27B) that scales by hidden size over heads.
    """
    if stored.whole("block_count") == largest:
        return stored.whole("embedding_length") // stored.whole("attention.head_count")
    return stored.head
