"""PEFT adapters for the recorded tiny models, without torch: reproducible random factors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

#: Family to the modules that are adapted.
TARGETS: Mapping[str, str] = {
    "gemma2": r"(q_proj|down_proj|k_proj)$",
    "gptneox": r"(query_key_value|dense|dense_h_to_4h)$",
    "mixtral": r"(q_proj|k_proj|w1|w2|w3|o_proj|lm_head)$",
    "phi3": r"(qkv_proj|o_proj|gate_up_proj|down_proj)$",
    "qwen3moe": r"(q_proj|v_proj|gate_proj|up_proj|down_proj)$",
}


def modules(weights: Mapping[str, np.ndarray], pattern: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the modules that match, with their weights."""
    for name, weight in sorted(weights.items()):
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and re.search(pattern, module):
            yield module, weight


def save_adapter(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    pattern: str,
    *,
    rank: int = 4,
    turned: bool = False,
    extra: Mapping[str, np.ndarray] | None = None,
    **settings: Any,
) -> None:
    """Write an adapter of the modules that match.

    Args:
        folder: where to.
        weights: of the base model.
        pattern: of module names.
        rank: of modules that no ``rank_pattern`` names.
        turned: weights are [in, out].
        extra: more tensors.
        settings: of ``adapter_config.json``.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    tensors: dict[str, np.ndarray] = dict(extra or {})
    for module, weight in modules(weights, pattern):
        rows, columns = weight.shape[::-1] if turned else weight.shape
        ranks = settings.get("rank_pattern", {})
        own = next((n for p, n in ranks.items() if re.search(rf"{p}$", module)), rank)
        for part, shape in (("A", (own, columns)), ("B", (rows, own))):
            values = random.integers(-64, 65, shape).astype(np.float32) / 256
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = values
    save_file(dict(sorted(tensors.items())), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "fan_in_fan_out": turned, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
