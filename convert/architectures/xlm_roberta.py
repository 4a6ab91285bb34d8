"""XLM-RoBERTa for embeddings, such as BGE-M3 (``general.architecture`` = ``bert``): Unigram.

Positions start after the padding token's id; the rows before are cut off.
"""

from __future__ import annotations

from ..tokenizers import TokenizerRule
from ._bert_like import ignored, shifted_keys, shifted_sizes, tensors
from ._record import Architecture

ARCHITECTURE = Architecture(
    name="bert",
    classes=("XLMRobertaModel",),
    headless=("XLMRobertaModel",),
    prefix="roberta.",
    rope="",
    defaults={
        "xlm-roberta": {
            "vocab_size": 30522,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "layer_norm_eps": 1e-12,
            "type_vocab_size": 2,
            "pad_token_id": 1,
        },
    },
    sizes=shifted_sizes,
    ignored=ignored("roberta"),
    extra_keys=shifted_keys,
    tokenizer=TokenizerRule(kinds=("unigram",), token_types=True),
    tensors=tensors("roberta", "from_first_position"),
    notes="embeddings only: pooler and heads are left out",
)
