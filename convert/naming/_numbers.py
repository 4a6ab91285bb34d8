"""Numbers of a model from its Hugging Face config: what the transforms of every naming need.

Shared by the naming modules, and the check that a config.json belongs to the checkpoint at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from .transforms import Sizes

_STRUCTURE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "n_embd", "n_layer", "n_head", "kv_lora_rank", "qk_rope_head_dim",
)  # fmt: skip


def count(settings: Mapping[str, Any], *keys: str) -> int:
    """Return the first of the settings that is there.

    Raises:
        ConfigError: it is no positive integer, or none is there.
    """
    value = next((settings[k] for k in keys if settings.get(k) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{keys[0]} is {value!r}: expected a positive integer")
    return value


def sizes_of(config: Mapping[str, Any], tied: bool, padded: int) -> Sizes:
    """Read the transforms' parameters from a Hugging Face config.

    Args:
        config: config.json.
        tied: the head is the embedding.
        padded: rows of the foreign embedding.

    Raises:
        ConfigError: a number is missing or senseless.
    """
    heads = count(config, "num_attention_heads", "n_head")
    kv_heads = config.get("num_key_value_heads")
    head_dim = config.get("head_dim")
    return Sizes(
        layers=count(config, "num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=heads if kv_heads is None else count(config, "num_key_value_heads"),
        head_dim=(
            count(config, "hidden_size", "n_embd") // heads
            if head_dim is None
            else count(config, "head_dim")
        ),
        vocab_size=count(config, "vocab_size"),
        padded_vocab_size=padded,
        tied=tied,
    )


def experts_of(config: Mapping[str, Any]) -> int:
    """Return the routed experts of a layer, 0 without."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(config[k]) for k in keys if isinstance(config.get(k), int)), 0)


def check_structure(ckpt: Checkpoint, derived: Mapping[str, Any]) -> None:
    """Refuse a config.json of another model. Raises ConfigError naming the first contradiction."""
    given = ckpt.config or {}
    for key in _STRUCTURE:
        if key in derived and given.get(key) is not None and given[key] != derived[key]:
            raise ConfigError(
                f"{ckpt.path}: was trained with {key} = {derived[key]}, but the config.json in use "
                f"says {given[key]}: it belongs to another model; give the right one with --config"
            )
