"""Qwen3.5, dense (``general.architecture`` = ``qwen35``): linear attention in three of four layers.

Of the models with a vision tower the text model is converted.
"""

from __future__ import annotations

from ..tokenizers import TokenizerRule
from ._blocks import gated_mlp
from ._linear_attention import count_predictions, layer_tags, sizes
from ._qwen35_like import DEFAULTS, keys, tensors
from ._record import Architecture

ARCHITECTURE = Architecture(
    name="qwen35",
    classes=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    composite=("Qwen3_5ForConditionalGeneration",),
    rope="neox",
    defaults={
        "qwen3_5_text": {
            **DEFAULTS,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
        },
    },
    sizes=sizes,
    layer_tags=layer_tags,
    prediction_layers=count_predictions,
    extra_keys=keys("qwen35"),
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=tensors(gated_mlp()),
    notes="text only: a vision tower is left out",
)
