"""Ministral 3 and the text part of Mistral Small 3.1/3.2 (``general.architecture`` = ``mistral3``).

As Llama, rotary pairs adjacent; Ministral 3 stretches its context with yarn and scales queries by
their position.
"""

from __future__ import annotations

from ...errors import UnsupportedError
from ..gguf.values import KeyValue, f32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, NORMS, attention, gated_mlp
from ._config import rope_parameters
from ._llama_like import adjust_vocabulary, extra_keys, rope_freqs
from ._record import Architecture, Config, ExtraTensor

_llama_keys = extra_keys("mistral3")


def _extra_keys(config: Config) -> list[KeyValue]:
    if config.get("model_type") == "mistral4":
        raise UnsupportedError(
            "config.json: Mistral 4 (latent attention, experts) is not supported"
        )
    keys = _llama_keys(config)
    if config.get("model_type") != "ministral3":
        return keys
    rope = rope_parameters(config)
    if rope.get("rope_type") != "yarn":
        raise UnsupportedError("config.json: Ministral 3 without yarn rope, which llama.cpp needs")
    return [
        *keys,
        f32("mistral3.rope.scaling.yarn_log_multiplier", rope["mscale_all_dim"]),
        f32("mistral3.attention.temperature_scale", rope["llama_4_scaling_beta"]),
    ]


def _rope(config: Config) -> dict[str, object] | None:
    """Return the rope settings of configurations that say nothing of rope."""
    if config.get("model_type") != "ministral3" or config.get("rope_theta"):
        return None
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "max_position_embeddings": 262144,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    }


ARCHITECTURE = Architecture(
    name="mistral3",
    classes=("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    composite=("Mistral3ForConditionalGeneration",),
    rope="norm",
    defaults={
        "ministral3": {
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 34,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope,
        },
    },
    extra_keys=_extra_keys,
    extra_tensors=(ExtraTensor("rope_freqs.weight", rope_freqs),),
    tokenizer=TokenizerRule(kinds=("tekken", "spm", "spm_json", "bpe"), space_prefix=True),
    adjust_vocabulary=adjust_vocabulary,
    tensors=(*FRAME, *NORMS, *attention(permuted=True), *gated_mlp(bias="maybe")),
    notes="text only: a vision tower is left out",
)
