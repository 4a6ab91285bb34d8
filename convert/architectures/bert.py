"""BERT for embeddings, such as BGE and E5 (``general.architecture`` = ``bert``)."""

from __future__ import annotations

from ..tokenizers import TokenizerRule
from ._bert_like import encoder_keys, ignored, sizes, tensors
from ._record import Architecture

ARCHITECTURE = Architecture(
    name="bert",
    classes=("BertModel", "BertForMaskedLM"),
    headless=("BertModel", "BertForMaskedLM"),
    prefix="bert.",
    rope="",
    defaults={
        "bert": {
            "vocab_size": 30522,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "layer_norm_eps": 1e-12,
            "type_vocab_size": 2,
        },
    },
    sizes=sizes,
    ignored=ignored("bert"),
    extra_keys=lambda config: encoder_keys("bert", config),
    tokenizer=TokenizerRule(kinds=("wordpiece",), token_types=True),
    tensors=tensors("bert"),
    notes="embeddings only: pooler and heads are left out",
)
