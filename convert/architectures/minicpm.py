"""MiniCPM 1 and 2 (``general.architecture`` = ``minicpm``): Llama with scaled depth and embedding.

Rotary pairs are adjacent in llama.cpp, so query and key rows are permuted.
"""

from __future__ import annotations

import numpy as np

from ...errors import ConfigError
from ..gguf.values import KeyValue, f32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, NORMS, attention, gated_mlp
from ._config import layer_count, rope_parameters
from ._record import Architecture, Config, ExtraTensor, head_dim, heads


def _extra_keys(config: Config) -> list[KeyValue]:
    return [
        f32("minicpm.embedding_scale", float(config["scale_emb"])),
        f32("minicpm.residual_scale", config["scale_depth"] / layer_count(config) ** 0.5),
        f32("minicpm.logit_scale", config["hidden_size"] / config["dim_model_base"]),
    ]


def _factors(name: str) -> ExtraTensor:
    def build(config: Config) -> np.ndarray | None:
        factors = rope_parameters(config).get(f"{name}_factor")
        if not factors:
            return None
        if len(factors) != head_dim(config) // 2:
            raise ConfigError(
                f"config.json: {name}_factor has {len(factors)} entries, {head_dim(config) // 2} "
                "are needed"
            )
        return np.array(factors, np.float32)

    return ExtraTensor(f"rope_factors_{name}.weight", build)


ARCHITECTURE = Architecture(
    name="minicpm",
    classes=("MiniCPMForCausalLM",),
    rope="norm",
    defaults={
        "minicpm": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "scale_emb": 1,
            "scale_depth": 1,
            "dim_model_base": 1,
        },
    },
    extra_keys=_extra_keys,
    extra_tensors=(_factors("long"), _factors("short")),
    tokenizer=TokenizerRule(kinds=("spm",)),
    tensors=(*FRAME, *NORMS, *attention(permuted=True, bias="no"), *gated_mlp()),
)
