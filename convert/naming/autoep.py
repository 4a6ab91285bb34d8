"""AutoEP's names (DeepSpeed 0.19): Hugging Face models of experts, with the layers of experts
replaced.

Only these are renamed: ``mlp.experts.w1.{expert}`` (gate), ``w2`` (down), ``w3`` (up) and
``mlp.router.gate``. The model's type comes from its config.json. Source: DeepSpeed
``module_inject/auto_ep_layer.py`` and ``auto_ep_presets/``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World
from .table import Rule, rule

_EXPERT = re.compile(r"^(.*\.layers\.\d+)\.mlp\.experts\.w([123])\.(\d+)$")
_ROUTER = re.compile(r"^(.*\.layers\.\d+)\.mlp\.(?:router\.gate|gate\.gate)\.weight$")
_PROJ = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}
_NEEDS = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
_KINDS = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def _right(name: str, kind: str) -> str:
    """Hugging Face's name of a tensor."""
    if match := _EXPERT.match(name):
        layer, number, expert = match.groups()
        if kind == "mixtral":
            return f"{layer}.block_sparse_moe.experts.{expert}.w{number}.weight"
        return f"{layer}.mlp.experts.{expert}.{_PROJ[number]}.weight"
    if match := _ROUTER.match(name):
        return f"{match[1]}.{'block_sparse_moe' if kind == 'mixtral' else 'mlp'}.gate.weight"
    return name


def _variants(ckpt: Checkpoint) -> Mapping[str, Variant]:
    if ckpt.naming != "autoep":
        raise ConfigError(f"{ckpt.path}: AutoEP checkpoints are not written; choose another --to")
    found = {}
    for kind, architecture in _KINDS.items():
        rules: list[Rule] = []
        for name in (*ckpt.weights, *ckpt.tied):
            right = _right(name, kind)
            how = "trim_vocab" if right in _NEEDS else "same"
            rules.append(rule(name, right, how, _NEEDS.get(right, "")))
        found[kind] = Variant(architecture, tuple(rules))
    return found


def _no_settings(ckpt: Checkpoint) -> Settings:
    return {}


NAMING = World("autoep", "AutoEP", _variants, _no_settings, lambda config: {}).naming
