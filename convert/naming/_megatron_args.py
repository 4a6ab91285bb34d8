"""Megatron's settings for a model that is described by a Hugging Face config.json.

The inverse of the reading direction in ``megatron``. Source: ``megatron/training/arguments.py`` and
the Megatron-Bridge model providers. A checkpoint that came from Megatron keeps its own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...shardio.checkpoint import Checkpoint
from ._megatron_families import Family
from .transforms import Sizes

_SCALING = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")


def saved_args(ckpt: Checkpoint) -> Mapping[str, Any]:
    """The settings of the Megatron run that a checkpoint came from; empty for other sources."""
    return ckpt.args if ckpt.format.startswith("megatron") else {}


def megatron_args(
    ckpt: Checkpoint, config: Mapping[str, Any], family: Family, sizes: Sizes
) -> dict[str, Any]:
    """Return the settings of a model.

    Args:
        ckpt: the checkpoint, for what its own Megatron run said.
        config: config.json.
        family: its table.
        sizes: of the model.
    """
    args: dict[str, Any] = {}
    for key, names in family.keys:
        if config.get(key) is not None:
            args[names.split("|")[0]] = config[key]
    if "intermediate_size" in config:
        args.setdefault("ffn_hidden_size", config["intermediate_size"])
    for more in (family.args, _rope(config), _router(family, config), saved_args(ckpt)):
        args |= more
    if not args.get("multi_latent_attention"):
        args["kv_channels"] = sizes.head_dim
    return args | {
        "group_query_attention": sizes.kv_heads != sizes.heads,
        "num_query_groups": sizes.kv_heads,
        "padded_vocab_size": sizes.padded_vocab_size,
        "untie_embeddings_and_output_weights": not sizes.tied,
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings; transformers 5 keeps them all in ``rope_parameters``."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = scaling if isinstance(scaling, Mapping) else {}
    out: dict[str, Any] = {}
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        out["rotary_base"] = int(theta)
        part = config.get("partial_rotary_factor", scaling.get("partial_rotary_factor"))
        out["rotary_percent"] = 1.0 if part is None else float(part)
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind == "llama3":
        out |= {"use_rope_scaling": True, "rope_scaling_factor": factor}
    elif kind == "linear":
        out["rotary_seq_len_interpolation_factor"] = factor
    elif kind == "yarn":
        out["rotary_scaling_factor"] = factor
        out |= {key: scaling[key] for key in _SCALING if scaling.get(key) is not None}
        original = scaling.get("original_max_position_embeddings")
        if original is not None:
            out["original_max_position_embeddings"] = original
    return out


def _router(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens choose experts, where it is no plain copy of an entry."""
    if "num_experts" not in (name for _, names in family.keys for name in names.split("|")):
        return {"num_experts": None}
    if family.model_type == "mixtral":
        return {"moe_router_pre_softmax": False}
    # softmax over the chosen experts alone equals normalised probabilities of all
    return {"moe_router_pre_softmax": not config.get("norm_topk_prob", False)}
