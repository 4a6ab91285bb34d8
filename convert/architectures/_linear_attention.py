"""What Qwen3-Next and Qwen3.5 share: three of four layers have linear attention, norms minus one.

The layers of multi-token prediction (``mtp.*``) follow the others as further blocks. Value heads
are reordered, see ``_state_space``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace

from ...errors import ConfigError
from ..gguf.values import KeyValue, booleans, u32
from ._blocks import LAYER, attention, head_norms
from ._config import layer_count, prediction_layers, rope_parameters
from ._record import Config, TensorRule, head_dim

LINEAR = f"{LAYER}.linear_attn"
MTP = "mtp.layers.{m}"
_FULL, _RECURRENT = "full", "linear"
_INTERVAL = 4


def is_linear(config: Config, layer: int) -> bool:
    """Return whether a layer has linear attention."""
    if layer >= layer_count(config):
        return False
    kinds = config.get("layer_types")
    if kinds is None:
        return bool((layer + 1) % config.get("full_attention_interval", _INTERVAL))
    if len(kinds) != layer_count(config):
        raise ConfigError(
            f"config.json: layer_types has {len(kinds)} entries, the model {layer_count(config)} "
            "layers"
        )
    return bool(kinds[layer] == "linear_attention")


def layer_tags(config: Config, layer: int) -> tuple[str, ...]:
    """Return the kind of attention of a layer."""
    kind = _RECURRENT if is_linear(config, layer) else _FULL
    return (kind, "first_mtp") if layer == layer_count(config) else (kind,)


def count_predictions(config: Config, names: Collection[str]) -> int:
    """Return the number of layers of multi-token prediction."""
    numbers = [int(n) for n in re.findall(r"\bmtp\.layers\.(\d+)\.", " ".join(names))]
    return max(numbers, default=-1) + 1


def sizes(config: Config) -> dict[str, int]:
    """Return the sizes of linear attention and of the gated query."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key, value = config["linear_key_head_dim"], config["linear_value_head_dim"]
    mixed = 2 * keys * key + values * value
    return {
        "key_heads": keys,
        "key_head": key,
        "value_heads": values,
        "value_head": value,
        "mixed": mixed,
        "values": values * value,
        "2value_heads": 2 * values,
        "qkvz": mixed + values * value,
        "kernel": config["linear_conv_kernel_dim"],
        "one": 1,
        "2hidden": 2 * config["hidden_size"],
        "gated_q": 2 * config["num_attention_heads"] * head_dim(config),
    }


def linear_keys(name: str) -> Callable[[Config], list[KeyValue]]:
    """Return what gives the keys of linear attention, under a GGUF name."""

    def keys(config: Config) -> list[KeyValue]:
        values = config["linear_num_value_heads"]
        more = prediction_layers(config)
        share = rope_parameters(config).get("partial_rotary_factor", 0.25)
        found = [u32(f"{name}.nextn_predict_layers", more)] if more else []
        numbers = {
            "ssm.conv_kernel": config["linear_conv_kernel_dim"],
            "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": config["linear_num_key_heads"],
            "ssm.time_step_rank": values,
            "ssm.inner_size": config["linear_value_head_dim"] * values,
        }
        found += [u32(f"{name}.{key}", n) for key, n in numbers.items()]
        recurrent = [is_linear(config, n) for n in range(layer_count(config) + more)]
        if config.get("layer_types") is not None:
            found.append(booleans(f"{name}.attention.recurrent_layers", recurrent))
        interval = config.get("full_attention_interval", _INTERVAL)
        return [
            *found,
            u32(f"{name}.full_attention_interval", interval),
            u32(f"{name}.rope.dimension_count", int(head_dim(config) * share)),
        ]

    return keys


def norm(gguf: str, hf: str) -> TensorRule:
    """Return a norm of a layer, stored minus one."""
    return TensorRule(f"blk.{{n}}.{gguf}", f"{LAYER}.{hf}", ("hidden",), "plus_one")


def linear(gguf: str, hf: str, *shape: str, transform: str = "") -> TensorRule:
    """Return a matrix of linear attention."""
    return TensorRule(f"blk.{{n}}.{gguf}", f"{LINEAR}.{hf}", shape, transform, layers=_RECURRENT)


def exact(
    gguf: str, hf: str, *shape: str, transform: str = "", keep_f32: bool = False
) -> TensorRule:
    """Return another tensor of linear attention, by its whole names."""
    return TensorRule(
        f"blk.{{n}}.{gguf}", f"{LINEAR}.{hf}", shape, transform, keep_f32=keep_f32, exact=True,
        layers=_RECURRENT,
    )  # fmt: skip


def full_attention() -> tuple[TensorRule, ...]:
    """Return the layers with attention; half of the query's rows are its gate."""
    rules = (*attention(), *head_norms(transform="plus_one"))
    query = replace(rules[0], shape=("gated_q", "hidden"))
    return tuple(replace(rule, layers=_FULL) for rule in (query, *rules[1:]))


def with_prediction(rules: tuple[TensorRule, ...]) -> tuple[TensorRule, ...]:
    """Return the rules of layers, and those of multi-token prediction after them."""
    main = tuple(replace(r, layers=f"main {r.layers}".strip()) for r in rules)
    deep = tuple(
        replace(r, hf=r.hf.replace(LAYER, MTP), layers=f"mtp {r.layers}".strip())
        for r in rules
        if _RECURRENT not in r.layers.split()
    )
    return (*main, *deep, *_AROUND_PREDICTION)


def _next(gguf: str, hf: str, *shape: str, transform: str = "plus_one") -> TensorRule:
    # only the first has them
    return TensorRule(f"blk.{{n}}.nextn.{gguf}", f"mtp.{hf}", shape, transform, layers="first_mtp")


_AROUND_PREDICTION = (
    _next("eh_proj", "fc", "hidden", "2hidden", transform=""),
    _next("enorm", "pre_fc_norm_embedding", "hidden"),
    _next("hnorm", "pre_fc_norm_hidden", "hidden"),
    _next("shared_head_norm", "norm", "hidden"),
)
