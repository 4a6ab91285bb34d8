"""One spelling for Megatron's tensor names.

Three spellings exist for one GPT model: nested ``language_model.encoder`` (before mcore), mcore's
local modules (``input_layernorm``) and mcore with Transformer Engine, which fuses norms into the
next linear (``linear_qkv.layer_norm_weight``). The readers give mcore's LOCAL spelling, with global
layer numbers, and one tensor per expert, numbered globally, oriented as a linear's weight:
``decoder.layers.7.mlp.experts.local_experts.31.linear_fc1.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

from ..names import strip_wrappers
from ..records import Record, StoredTensor

_LAYER = re.compile(r"^((?:decoder|encoder|mtp)\.layers)\.(\d+)\.(.*)$")
_EXPERT = re.compile(r"^(.*\.mlp\.experts\.local_experts)\.(\d+)\.(.*)$")
_GROUPED_TE = re.compile(r"^(.*\.mlp\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)$")

_OUTER = re.compile(
    r"^(?:(?:model|module|language_model)\.)+(?=(?:embedding|decoder|encoder|output_layer|mtp)\.)"
)

# buffers and caches that are no part of the model
_IGNORED = ("_extra_state", "local_tokens_per_expert", "rotary_pos_emb.inv_freq")
# saved with the model, but never updated by the optimizer
_BUFFERS = (".expert_bias",)

_NESTED = (
    ("language_model.embedding.", "embedding."),
    ("language_model.encoder.", "decoder."),
    ("language_model.transformer.", "decoder."),
    ("language_model.output_layer.", "output_layer."),
    ("word_embeddings_for_head.", "output_layer."),
)
_OLD = (
    ("decoder.final_norm.", "decoder.final_layernorm."),
    (".input_norm.", ".input_layernorm."),
    (".post_attention_norm.", ".pre_mlp_layernorm."),
    (".post_attention_layernorm.", ".pre_mlp_layernorm."),
    (".attention.", ".self_attention."),
    (".self_attention.query_key_value.", ".self_attention.linear_qkv."),
    (".self_attention.dense.", ".self_attention.linear_proj."),
    (".mlp.dense_h_to_4h.", ".mlp.linear_fc1."),
    (".mlp.dense_4h_to_h.", ".mlp.linear_fc2."),
    (".mlp.local_experts.", ".mlp.experts.local_experts."),
)
_OLD_EXPERT = ((".dense_h_to_4h.", ".linear_fc1."), (".dense_4h_to_h.", ".linear_fc2."))
_FUSED_NORM = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
    (".self_attention.linear_q_up_proj.layer_norm_", ".self_attention.q_layernorm."),
    (".self_attention.linear_kv_up_proj.layer_norm_", ".self_attention.kv_layernorm."),
    (".mixer.in_proj.layer_norm_", ".norm."),
)


def is_ignored(name: str) -> bool:
    """Whether a saved key is no part of the model: FP8 metadata, counters, rotary tables."""
    return any(part in name for part in _IGNORED)


def is_parameter(name: str) -> bool:
    """Whether the optimizer knows the tensor (False for buffers such as the router's bias)."""
    return not name.endswith(_BUFFERS)


@lru_cache(maxsize=1 << 16)
def canonical(name: str) -> str:
    """Return the one spelling of a name (layer and expert numbers as they are)."""
    name = strip_wrappers(name)
    for prefix, new in _NESTED:
        if name.startswith(prefix):
            name = new + name.removeprefix(prefix)
            break
    else:
        name = re.sub(
            r"^(?:model|language_model)\.(?=embedding\.|decoder\.|output_layer\.)", "", name
        )
    for old, new in _OLD:
        name = name.replace(old, new)
    if ".local_experts." in name:
        for old, new in _OLD_EXPERT:
            name = name.replace(old, new)
    for old, new in _FUSED_NORM:
        name = name.replace(old, new)
    grouped = _GROUPED_TE.match(name)
    if grouped:
        return f"{grouped[1]}.local_experts.{grouped[4]}.{grouped[2]}.{grouped[3]}"
    return name


def is_expert(name: str) -> bool:
    """Whether the (canonical) tensor belongs to routed experts: cut by EP and ETP, not by TP."""
    return ".mlp.experts." in name


def layer_of(name: str) -> int | None:
    """Return the decoder layer number in a canonical name, None outside the layers."""
    m = _LAYER.match(name)
    return int(m[2]) if m and m[1] == "decoder.layers" else None


def shift_layer(name: str, offset: int) -> str:
    """Return the name with ``offset`` added to its decoder layer number."""
    m = _LAYER.match(name)
    if not m or not offset or m[1] != "decoder.layers":
        return name
    return f"{m[1]}.{int(m[2]) + offset}.{m[3]}"


def shift_expert(name: str, offset: int) -> str:
    """Return the name with ``offset`` added to its expert number."""
    m = _EXPERT.match(name) if offset else None
    return f"{m[1]}.{int(m[2]) + offset}.{m[3]}" if m else name


def expert_of(name: str) -> int | None:
    """Return the expert number in a canonical name, None for everything else."""
    m = _EXPERT.match(name)
    return int(m[2]) if m else None


def flatten(model: Mapping[object, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted name, value) of a nested state dict, in saved order."""
    for key, value in model.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, name + ".")
        else:
            yield name, value


def tensors_of(model: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    """Yield (saved name, value) of all that is a tensor of the model, or stands in its place."""
    for name, value in flatten(model):
        if isinstance(value, StoredTensor | Record) and not is_ignored(name):
            yield name, value
