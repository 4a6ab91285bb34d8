"""What the Gemma families share: norms stored minus one, no head of their own, their tokenizer.

A space is not put before the text; the key that says so comes last.
"""

from __future__ import annotations

from dataclasses import replace

from ..gguf.values import boolean
from ..tokenizers import TokenizerRule, Vocabulary
from ._blocks import LAYER
from ._record import Config, TensorRule

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
