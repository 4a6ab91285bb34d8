"""``config.json`` with what its Hugging Face class would assume filled in, and the rope settings.

Older configurations say ``rope_theta`` and ``rope_scaling``, newer ones ``rope_parameters``; both
end as one ``rope_parameters`` here. Composite models keep the text model's entries in
``text_config``, which win over the outer ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigError, UnsupportedError
from ._record import Architecture, Config

LAYERS = ("n_layers", "num_hidden_layers", "n_layer", "num_layers")
#: Names of rope settings outside ``rope_parameters``.
_THETA = (
    "global_rope_theta",
    "rope_global_theta",
    "rope_theta_global",
    "rope_theta",
    "rotary_emb_base",
)
_LOCAL_THETA = (
    "local_rope_theta",
    "rope_local_theta",
    "rope_theta_local",
    "swa_rope_theta",
    "rope_local_base_freq",
)
_PARTIAL = ("partial_rotary_factor", "rope_pct", "rope_percent")
_MOST_LAYERS = 100_000  # before a table of their tensors is made
#: Where a completed configuration says how many layers of multi-token prediction there are.
_PREDICTION = "prediction_layers"
#: Rope types that need the context length the model was first trained with.
_STRETCHED = frozenset({"llama3", "yarn", "longrope", "dynamic"})


def complete_config(
    config: Config, architecture: Architecture, names: Collection[str] = ()
) -> dict[str, Any]:
    """Return the configuration with defaults and unified rope settings.

    Args:
        config: config.json.
        architecture: the model family.
        names: the checkpoint's tensors, which tell whether layers of multi-token prediction are
            there: some configurations speak of those that were left out.

    Raises:
        ConfigError: an entry that everything depends on is missing or not a positive number.
        UnsupportedError: the weights are quantized.
    """
    full = dict(config)
    if isinstance(full.get("text_config"), Mapping):
        full |= full["text_config"]
    quantized = full.get("quantization_config")
    if (
        isinstance(quantized, Mapping)
        and quantized.get("quant_method") not in architecture.quantized
    ):
        raise UnsupportedError(
            f"config.json: the weights are quantized ({quantized.get('quant_method')}); "
            "dequantize them to 16 bits first, or convert the model they were made from"
        )
    kinds = architecture.defaults
    chosen = kinds.get(str(full.get("model_type")), next(iter(kinds.values()), {}))
    for key, default in chosen.items():
        if callable(default):
            full[key] = default(full) if full.get(key) is None else full[key]
        else:  # null is a value: it says that there is none
            full.setdefault(key, default)
    for key, other in architecture.synonyms.items():
        if full.get(other) is None and full.get(key) is not None:
            full[other] = full[key]
    for key in ("hidden_size", "num_attention_heads", "vocab_size"):
        if architecture.attention or key != "num_attention_heads":
            _positive(full, (key,))
    _positive(full, LAYERS, _MOST_LAYERS)
    full["rope_parameters"] = _rope(full)
    full[_PREDICTION] = architecture.prediction_layers(full, names)
    return full


def find(config: Config, keys: tuple[str, ...]) -> Any:
    """Return the value of the first of ``keys`` that is there; None when none is."""
    return next((config[key] for key in keys if key in config), None)


def layer_count(config: Config) -> int:
    """Return the number of layers."""
    return int(find(config, LAYERS))


def prediction_layers(config: Config) -> int:
    """Return the number of layers of multi-token prediction that the checkpoint has."""
    return int(config.get(_PREDICTION, 0))


def rope_parameters(config: Config) -> Mapping[str, Any]:
    """Return the rope settings of the (full-attention) layers."""
    rope: Mapping[str, Any] = config["rope_parameters"]
    inner: Mapping[str, Any] = rope.get("full_attention", rope)
    return inner


def _positive(config: Config, keys: tuple[str, ...], most: int = 2**31 - 1) -> None:
    value = find(config, keys)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(
            f"config.json: {keys[0] if len(keys) == 1 else ' or '.join(keys)} is {value!r}, "
            f"a positive whole number up to {most} is needed"
        )


def _rope(config: Config) -> dict[str, Any]:
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config.json: rope settings are {given!r}, an object is needed")
    rope = dict(given)
    if "full_attention" in rope or "sliding_attention" in rope:
        return rope
    theta = find(config, _THETA)
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    partial = find(config, _PARTIAL)
    if partial is not None:
        rope.setdefault("partial_rotary_factor", partial)
    rope.setdefault("rope_type", rope.get("type", "default"))
    context = config.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    if context is not None and str(rope["rope_type"]) in _STRETCHED:
        rope.setdefault("original_max_position_embeddings", context)
    local = find(config, _LOCAL_THETA)
    if local is None:
        return rope
    near = {"rope_type": "default", "rope_theta": local}
    return {"full_attention": rope, "sliding_attention": near}
