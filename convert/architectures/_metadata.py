"""The metadata keys that every text model has, from its completed configuration.

Keys and their order are those of llama.cpp's converter. Values that the configuration does not
have are left out; llama.cpp then uses its own defaults or says what it needs.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError, UnsupportedError
from ..gguf.values import KeyValue, boolean, f32, i32_array, string, u32
from ._config import find, layer_count, prediction_layers, rope_parameters
from ._record import Architecture, Config

#: GGUF key to the names it has in configurations, tried in order.
LENGTHS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "context_length",
        (
            "max_position_embeddings",
            "n_ctx",
            "n_positions",
            "max_length",
            "max_sequence_length",
            "model_max_length",
        ),
    ),
    ("embedding_length", ("hidden_size", "n_embd", "dim")),
    (
        "feed_forward_length",
        (
            "prefix_dense_intermediate_size",
            "dense_intermediate_size",
            "intermediate_size",
            "n_inner",
            "hidden_dim",
        ),
    ),
    ("attention.head_count", ("num_attention_heads", "n_head", "n_heads")),
    ("attention.head_count_kv", ("num_key_value_heads", "n_kv_heads")),
)
EPSILONS = (
    ("attention.layer_norm_rms_epsilon", ("rms_norm_eps", "norm_eps")),
    (
        "attention.layer_norm_epsilon",
        ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    ),
)
EXPERTS = (
    ("expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")),
    ("expert_group_count", ("n_group",)),
    ("expert_group_used_count", ("topk_group",)),
)
_GATING_KEYS = (
    "score_function",
    "scoring_func",
    "score_func",
    "moe_router_activation",
    "moe_router_activation_func",
    "expert_selection_fn",
)
_GATING = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}
YARN = (
    ("extrapolation_factor", "yarn_ext_factor"),
    ("attention_factor", "yarn_attn_factor"),
    ("beta_fast", "yarn_beta_fast"),
    ("beta_slow", "yarn_beta_slow"),
)


def model_entries(architecture: Architecture, config: Config, file_type: int) -> list[KeyValue]:
    """Return the hyper-parameter entries, ``general.file_type`` and the family's own keys.

    Args:
        architecture: the family.
        config: a completed configuration.
        file_type: the ``llama_ftype`` number of the output.

    Raises:
        ConfigError: a value has the wrong type.
        UnsupportedError: a setting that llama.cpp does not know.
    """
    prefix = architecture.name
    entries = [u32(f"{prefix}.block_count", layer_count(config) + prediction_layers(config))]
    entries += _numbers(prefix, config, LENGTHS)
    if config.get("is_causal") is False:
        entries.append(boolean(f"{prefix}.attention.causal", False))
    entries += _rope_entries(prefix, config)
    for key, names in EPSILONS:
        value = find(config, names)
        if value is not None:
            entries.append(f32(f"{prefix}.{key}", _number(names[0], value)))
    entries += _numbers(prefix, config, EXPERTS)
    entries += _gating(prefix, config)
    if config.get("head_dim") is not None:
        for key in ("attention.key_length", "attention.value_length"):
            entries.append(u32(f"{prefix}.{key}", config["head_dim"]))
    entries.append(u32("general.file_type", file_type))
    # a key that comes again keeps its place and takes the new value
    found = {entry.key: entry for entry in (*entries, *architecture.extra_keys(config))}
    if not architecture.key_order:
        return list(found.values())
    whole = ("general.", "tokenizer.")
    wanted = [k if k.startswith(whole) else f"{prefix}.{k}" for k in architecture.key_order]
    return [found[key] for key in wanted if key in found]


def _numbers(
    prefix: str, config: Config, table: tuple[tuple[str, tuple[str, ...]], ...]
) -> list[KeyValue]:
    entries = []
    for key, names in table:
        value = find(config, names)
        if isinstance(value, list):
            entries.append(i32_array(f"{prefix}.{key}", value))
        elif value is not None:
            entries.append(u32(f"{prefix}.{key}", int(_number(names[0], value))))
    return entries


def _rope_entries(prefix: str, config: Config) -> list[KeyValue]:
    rope = rope_parameters(config)
    entries = _scaling_entries(f"{prefix}.rope.scaling", rope)
    sections = config["rope_parameters"].get("mrope_section")
    if sections is not None:
        padded = [*sections, 0, 0, 0, 0][: max(4, len(sections))][:4]
        entries.append(i32_array(f"{prefix}.rope.dimension_sections", padded))
    if rope.get("rope_theta") is not None:
        entries.append(f32(f"{prefix}.rope.freq_base", _number("rope_theta", rope["rope_theta"])))
    local = config["rope_parameters"].get("sliding_attention", {}).get("rope_theta")
    if local is not None:
        entries.append(f32(f"{prefix}.rope.freq_base_swa", _number("rope_theta", local)))
    return entries


def _scaling_entries(prefix: str, rope: Config) -> list[KeyValue]:
    """Return the entries of a stretched context; llama3's goes into a tensor, not in here."""
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind == "linear" and factor is not None:
        return [string(f"{prefix}.type", "linear"), f32(f"{prefix}.factor", factor)]
    if kind in ("su", "longrope"):
        return [string(f"{prefix}.type", "longrope")]
    if kind != "yarn" or factor is None:
        return []
    original = rope.get("original_max_position_embeddings")
    if original is None:
        raise ConfigError("config.json: yarn rope needs original_max_position_embeddings")
    entries = [
        string(f"{prefix}.type", "yarn"),
        f32(f"{prefix}.factor", factor),
        u32(f"{prefix}.original_context_length", original),
    ]
    values = dict(rope)
    values.setdefault("attention_factor", rope.get("attn_factor"))
    return entries + [
        f32(f"{prefix}.{key}", values[name]) for name, key in YARN if values.get(name) is not None
    ]


def _gating(prefix: str, config: Config) -> list[KeyValue]:
    name = find(config, _GATING_KEYS)
    if name is None:
        return []
    if name not in _GATING:
        raise UnsupportedError(
            f"config.json: expert scoring {name!r} is not known; known: {', '.join(_GATING)}"
        )
    return [u32(f"{prefix}.expert_gating_func", _GATING[name])]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:
        raise ConfigError(f"config.json: {name} is {value!r}, a number is needed")
    return value
