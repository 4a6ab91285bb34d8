"""From the metadata of a GGUF file back to ``config.json``: the inverse of ``_metadata``.

What every family has in common is undone here, by the same tables; what is particular to a family
is said by its record's ``restore``. Numbers that GGUF keeps in 32 bits come back as the shortest
decimals that mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ConfigError
from ._config import LAYERS
from ._metadata import EPSILONS, EXPERTS, LENGTHS, YARN
from ._record import Architecture

#: What a key is called where a family's defaults do not tell.
_USUAL = {"feed_forward_length": "intermediate_size", "expert_count": "num_experts"}


@dataclass(frozen=True, slots=True)
class Stored:
    """What a GGUF file says of a model.

    Attributes:
        keys: metadata by key without the family's prefix, in the file's order.
        shapes: row-major shapes of all tensors.
        read: a (small) tensor's float32 values by name.
    """

    keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number. Raises ConfigError when it is missing or something else."""
        value = self.keys.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ConfigError(f"the metadata key {key} is {value!r}, a whole number is needed")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number as a short decimal. Raises ConfigError when it is missing or none."""
        value = self.keys.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise ConfigError(f"the metadata key {key} is {value!r}, a number is needed")
        return short(float(value))

    def has(self, *tensors: str) -> bool:
        """Return whether all these tensors are there."""
        return all(name in self.shapes for name in tensors)

    @property
    def head(self) -> int:
        """Size of an attention head."""
        heads = self.whole("attention.head_count")
        given = self.whole("attention.key_length", 0)
        return given or self.whole("embedding_length") // max(1, heads)


def short(value: float) -> float:
    """Return the shortest decimal that a 32-bit float stands for."""
    return float(str(np.float32(value)))


def restored_config(architecture: Architecture, stored: Stored) -> dict[str, Any]:
    """Return ``config.json`` of a stored model.

    Raises:
        ConfigError: a key is missing or has the wrong type.
    """
    own = dict(architecture.restore(stored)) if architecture.restore is not None else {}
    kind = own.setdefault("model_type", next(iter(architecture.defaults)))
    known = {*architecture.defaults[kind], *architecture.synonyms}
    layers = stored.whole("block_count") - stored.whole("nextn_predict_layers", 0)
    config: dict[str, Any] = {
        "architectures": [architecture.classes[0]],
        "model_type": kind,
        _name(LAYERS, known, "num_hidden_layers"): layers,
        "vocab_size": (stored.shapes.get("token_embd.weight") or (0,))[0],
        "tie_word_embeddings": not stored.has("output.weight"),
    }
    for key, names in (*LENGTHS, *EXPERTS):
        if key in stored.keys:
            config[_name(names, known, _USUAL.get(key, names[0]))] = stored.whole(key)
    for key, names in EPSILONS:
        if key in stored.keys:
            config[_name(names, known, names[0])] = stored.number(key)
    if "attention.key_length" in stored.keys:
        config["head_dim"] = stored.whole("attention.key_length")
    config |= restored_rope(stored)
    return {key: value for key, value in (config | own).items() if value is not ...}


def _name(names: tuple[str, ...], known: set[str], usual: str) -> str:
    return next((name for name in names if name in known), usual)


def restored_rope(stored: Stored) -> dict[str, Any]:
    """Return the rope settings, those of stretched contexts included."""
    out: dict[str, Any] = {}
    if "rope.freq_base" in stored.keys:
        out["rope_theta"] = stored.number("rope.freq_base")
    if "rope.freq_base_swa" in stored.keys:
        out["rope_local_base_freq"] = stored.number("rope.freq_base_swa")
    kind = stored.keys.get("rope.scaling.type")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": stored.number("rope.scaling.factor")}
        if kind == "yarn":
            key = "rope.scaling.original_context_length"
            scaling["original_max_position_embeddings"] = stored.whole(key)
            for name, key in YARN:
                if f"rope.scaling.{key}" in stored.keys:
                    scaling[name] = stored.number(f"rope.scaling.{key}")
        out["rope_scaling"] = scaling
    return out
