"""Granite 3 and 4, dense (``general.architecture`` = ``granite``): Llama with four multipliers."""

from __future__ import annotations

from collections.abc import Callable

from ..gguf.values import KeyValue, f32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, NORMS, attention, gated_mlp
from ._llama_like import adjust_vocabulary, extra_keys, restore, rope_freqs
from ._record import Architecture, Config, Default, ExtraTensor
from ._restore import Stored

_SCALES = (
    ("attention.scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
)
DEFAULTS: dict[str, Default] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    **{name: 1.0 for _, name in _SCALES},
}


def granite_keys(name: str) -> Callable[[Config], list[KeyValue]]:
    """Return what gives Llama's keys and the multipliers, under a GGUF name."""
    common = extra_keys(name)

    def keys(config: Config) -> list[KeyValue]:
        scales = [f32(f"{name}.{key}", config[of]) for key, of in _SCALES if config.get(of)]
        return [*common(config), *scales]

    return keys


def restored_scales(stored: Stored) -> dict[str, object]:
    """Return Llama's settings and the multipliers of a stored model."""
    scales = {of: stored.number(key, 1.0) for key, of in _SCALES}
    return {**restore(stored), **scales}


ARCHITECTURE = Architecture(
    name="granite",
    classes=("GraniteForCausalLM",),
    rope="norm",
    defaults={"granite": DEFAULTS},
    extra_keys=granite_keys("granite"),
    extra_tensors=(ExtraTensor("rope_freqs.weight", rope_freqs),),
    adjust_vocabulary=adjust_vocabulary,
    restore=restored_scales,
    tokenizer=TokenizerRule(kinds=("spm", "spm_json", "bpe"), space_prefix=True),
    tensors=(*FRAME, *NORMS, *attention(permuted=True), *gated_mlp(bias="maybe")),
)
