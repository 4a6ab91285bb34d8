"""SmolLM3 (``general.architecture`` = ``smollm3``): Llama without rope in every fourth layer.

Which layers those are is fixed in llama.cpp. Query and key rows are permuted.
"""

from __future__ import annotations

from ...errors import UnsupportedError
from ..gguf.values import KeyValue
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, NORMS, attention, gated_mlp
from ._llama_like import adjust_vocabulary, extra_keys, restore, rope_freqs
from ._record import Architecture, Config, ExtraTensor

_common_keys = extra_keys("smollm3")


def _extra_keys(config: Config) -> list[KeyValue]:
    rotated = config.get("no_rope_layers")
    if rotated and any(bool(on) != bool((n + 1) % 4) for n, on in enumerate(rotated)):
        raise UnsupportedError(
            f"config.json: no_rope_layers is {rotated}; llama.cpp leaves out rope in every fourth "
            "layer, whatever the configuration says"
        )
    return _common_keys(config)


ARCHITECTURE = Architecture(
    name="smollm3",
    classes=("SmolLM3ForCausalLM",),
    rope="norm",
    defaults={
        "smollm3": {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
    },
    extra_keys=_extra_keys,
    extra_tensors=(ExtraTensor("rope_freqs.weight", rope_freqs),),
    adjust_vocabulary=adjust_vocabulary,
    restore=restore,
    tokenizer=TokenizerRule(kinds=("spm", "spm_json", "bpe"), space_prefix=True),
    tensors=(*FRAME, *NORMS, *attention(permuted=True), *gated_mlp(bias="maybe")),
)
