"""How much work a token is: the numbers behind MFU.

A trained token costs 6 floating point operations per weight that multiplies it (2 forward, 4
backward), and attention 12 * layers * heads * head size * sequence length, causality not
discounted (PaLM, Chowdhery et al. 2022, appendix B). Peak rates are the makers' figures for dense
bfloat16.
"""

from __future__ import annotations

from ..settings.model import ModelConfig

#: Part of a device's name, to its peak dense bfloat16 rate in TFLOP/s; the first match counts.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "A10": 125.0,
    "L4": 121.0,
    "MI300X": 1307.0,
}


def layer_weights(config: ModelConfig, active: bool = False) -> int:
    """Return the weights of a layer's matrices; ``active``: only those that a token meets."""
    queries = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * queries + 2 * shared)
    if not config.num_experts:
        return attention + 3 * config.hidden_size * config.intermediate_size
    experts = config.num_experts_per_tok if active else config.num_experts
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return attention + config.hidden_size * config.num_experts + experts * expert


def flops_per_token(config: ModelConfig, seq_len: int, frozen: bool = False) -> float:
    """Return the floating point operations of training on one token, forward and backward.

    Args:
        config: of the model.
        seq_len: tokens of a sequence.
        frozen: weights get no gradients (adapters, whose own work is left out): 4 per weight.
    """
    weights = config.num_hidden_layers * layer_weights(config, active=True)
    weights += config.vocab_size * config.hidden_size  # the head; looking up embeddings is free
    width = config.num_attention_heads * config.head_dim
    return (4.0 if frozen else 6.0) * weights + 12.0 * config.num_hidden_layers * width * seq_len


def peak_flops(device: str) -> float | None:
    """Return the peak FLOP/s of a device by its name; None when it is not known."""
    return next((peak * 1e12 for name, peak in PEAKS.items() if name in device), None)
