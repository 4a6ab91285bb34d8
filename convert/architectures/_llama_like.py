"""What Llama has in common with the families derived from it: keys, scaled rope, vocabulary.

Llama 3's rope scaling becomes the ``rope_freqs`` tensor: one divisor per frequency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import ConfigError
from ..gguf.values import KeyValue, u32
from ..tokenizers import Vocabulary
from ._config import rope_parameters
from ._record import Config, head_dim
from ._restore import Stored, short


def extra_keys(name: str) -> Callable[[Config], list[KeyValue]]:
    """Return what gives the keys beyond the common ones, under a GGUF name."""

    def keys(config: Config) -> list[KeyValue]:
        return [
            u32(f"{name}.vocab_size", config["vocab_size"]),
            u32(f"{name}.rope.dimension_count", head_dim(config)),
        ]

    return keys


def rope_freqs(config: Config) -> np.ndarray | None:
    """Return float32 [head_dim / 2] divisors of the rotary frequencies, for rope type llama3.

    Long wavelengths are divided by ``factor``, short ones not at all, those between smoothly.
    """
    rope = rope_parameters(config)
    if str(rope.get("rope_type")).lower() != "llama3":
        return None
    one, dim = np.float32(1), head_dim(config)
    factor = np.float32(_positive(rope, "factor", 8.0))
    low, high = _positive(rope, "low_freq_factor", 1.0), _positive(rope, "high_freq_factor", 4.0)
    context = _positive(rope, "original_max_position_embeddings", 8192)
    # The reference multiplies by float32 reciprocals; dividing would change the last bit.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    theta = _positive(rope, "rope_theta", 10000.0)
    powers = np.power(np.float64(theta), exponents.astype(np.float64))
    frequencies = one / powers.astype(np.float32)
    wavelengths = one / frequencies * np.float32(2 * np.pi)
    smooth = one / wavelengths * np.float32(context) - np.float32(low)
    with np.errstate(divide="ignore", invalid="ignore"):  # low == high leaves nothing between
        smooth /= np.float32(high - low)
        divisors = one / ((one - smooth) / factor + smooth)
    divisors[wavelengths > np.float32(context / low)] = factor
    divisors[wavelengths < np.float32(context / high)] = one
    return divisors


def _positive(rope: Mapping[str, Any], key: str, default: float) -> float:
    value = rope.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ConfigError(f"config.json: {key} of the rope is {value!r}, not a positive number")
    return value


def adjust_vocabulary(vocabulary: Vocabulary, config: Config) -> Vocabulary:
    """Two families are known by their vocabulary size alone: Code Llama and small Granite."""
    specials, size = vocabulary.specials, config["vocab_size"]
    if size == 32016 and "eot" not in specials.ids:
        specials = replace(specials, ids={**specials.ids, "eot": 32010})
    if size == 49152:
        specials = replace(specials, add={**specials.add, "bos": False})
    return replace(vocabulary, specials=specials)


def restore(stored: Stored) -> dict[str, Any]:
    """Return the biases and the scaled rope of a stored model."""
    own: dict[str, Any] = {
        "attention_bias": stored.has("blk.0.attn_q.bias"),
        "mlp_bias": stored.has("blk.0.ffn_gate.bias"),
    }
    if stored.has("rope_freqs.weight"):
        own["rope_scaling"] = _restored_scaling(stored)
    return own


def _restored_scaling(stored: Stored) -> dict[str, Any]:
    """Return settings that give the stored divisors: usual ones if they do, else fitted ones.

    Raises:
        ConfigError: the divisors are not those of rope type llama3.
    """
    divisors = stored.read("rope_freqs.weight")
    context, theta = stored.whole("context_length"), stored.number("rope.freq_base", 10000.0)
    base = {"rope_type": "llama3", "factor": short(float(divisors.max()))}
    lengths = [8192, *(1 << k for k in range(5, 21)), context]
    tries = [(1.0, 4.0, length) for length in lengths] + _fitted(divisors, theta, 2 * len(divisors))
    for low, high, length in tries:
        scaling = {
            **base,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
        config = {
            "head_dim": 2 * len(divisors),
            "hidden_size": 2 * len(divisors),
            "num_attention_heads": 1,
            "rope_parameters": {**scaling, "rope_theta": theta},
        }
        found = rope_freqs(config)
        if found is not None and np.array_equal(found, divisors):
            return scaling
    raise ConfigError(
        "rope_freqs.weight does not follow from rope scaling of type llama3: give the model's own "
        "config.json with --config"
    )


def _fitted(divisors: np.ndarray, theta: float, dim: int) -> list[tuple[float, float, int]]:
    """Return settings from the line between the divided and the undivided frequencies."""
    factor = float(divisors.max())
    between = np.flatnonzero((divisors > 1) & (divisors < factor))
    if factor <= 1 or len(between) < 2:
        return []
    smooth = (1 / divisors[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    turns = theta ** (-2.0 * between / dim) / (2 * np.pi)
    slope, offset = np.polyfit(turns, smooth, 1)
    if slope <= 0 or offset >= 0:
        return []
    high = 1 - 1 / offset
    return [(1.0, short(round(high, 4)), max(1, round(slope * (high - 1))))]
