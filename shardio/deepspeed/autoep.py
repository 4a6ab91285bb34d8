"""AutoEP (DeepSpeed 0.19): experts of Hugging Face models, fused per rank and cut over ranks.

A rank trains ``{layer}.experts.w1`` [local experts, ...] (w1 gate, w2 down, w3 up). Expert files
have one expert each, ``{layer}.experts.w1.{number}``; the optimizer has the fused tensor, cut over
the ranks that hold the same experts. ``ds_autoep_layers`` says which those are. After ``engine.py``
(_save_moe_checkpoint) and ``checkpoint/autoep_universal.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import FormatError, UnsupportedError
from ..stored import plain
from ..tensor import LazyTensor
from .states import ModelState

NAMING = "autoep"
_FUSED = re.compile(r"^(.*\.experts)\.w[123]$")
_MOST = 1 << 20
_ONE = re.compile(r"\.experts\.w[123]\.\d+$")


def is_autoep(names: Iterable[str]) -> bool:
    """Whether tensors have the names of AutoEP's expert files."""
    return any(_ONE.search(n) for n in names)


def local_experts(model: ModelState) -> dict[str, int]:
    """Return the experts of each rank by the fused tensors' prefix; empty without AutoEP.

    Raises:
        FormatError: malformed ``ds_autoep_layers``.
        UnsupportedError: experts that are not dealt out in order and evenly, or folded over
            tensor-parallel ranks.
    """
    entries = model.fields.get("ds_autoep_layers")
    if not entries:
        return {}
    if model.fields.get("folding"):
        raise UnsupportedError(
            f"{model.path}: AutoEP folded with AutoTP cannot be read; convert it with DeepSpeed's "
            "ds_to_universal first"
        )
    found: dict[str, int] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        prefix, count = _layer(model, entry)
        found[prefix] = count
    return found


def _layer(model: ModelState, entry: object) -> tuple[str, int]:
    # key by key: the maps of a large model, which say the same again, are too much for plain data
    raw: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    prefix = raw.get("expert_key_prefix")
    values = [plain(raw.get(k)) for k in ("num_experts", "num_local_experts", "ep_size")]
    numbers = [n for n in values if type(n) is int and 0 < n < _MOST]
    if not isinstance(prefix, str) or len(numbers) < len(values):
        raise FormatError(f"{model.path}: ds_autoep_layers: expected a table per layer of experts")
    experts, local, ep = numbers
    placement = plain(raw.get("expert_placement"))
    ranks = placement.get("ranks") if isinstance(placement, dict) else None
    even = local * ep == experts
    in_order = ({"rank": r, "experts": [*range(r * local, (r + 1) * local)]} for r in range(ep))
    if not even or (ranks is not None and ranks != list(in_order)):
        raise UnsupportedError(
            f"{model.path}: the experts of {prefix} are not dealt out to ranks in order and "
            "evenly; convert it with DeepSpeed's ds_to_universal first"
        )
    return prefix, local


def is_fused(name: str, layers: Mapping[str, int]) -> bool:
    """Whether a parameter is a rank's fused experts."""
    match = _FUSED.match(name)
    return match is not None and match[1] in layers


def unfused(
    tensors: Mapping[str, LazyTensor], ep_rank: int, layers: Mapping[str, int]
) -> dict[str, LazyTensor]:
    """Return one tensor per expert, under the names of the expert files.

    Args:
        tensors: fused ones of an expert-parallel rank, and perhaps others.
        ep_rank: that rank.
        layers: as ``local_experts`` gives them.

    Raises:
        FormatError: another number of experts than the layer says.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = _FUSED.match(name)
        if match is None or match[1] not in layers:
            found[name] = tensor
            continue
        local = layers[match[1]]
        if not tensor.ndim or tensor.shape[0] != local:
            raise FormatError(
                f"{name} has shape {tensor.shape} on each rank, expected {local} experts: the "
                "files are of different models"
            )
        for e in range(local):
            rest = [slice(0, n) for n in tensor.shape[1:]]
            one = tensor.slice([slice(e, e + 1), *rest]).reshape(tensor.shape[1:])
            found[f"{name}.{ep_rank * local + e}"] = one
    return found


def router_aliases(names: Iterable[str], layers: Mapping[str, int]) -> dict[str, str]:
    """Return the second names that AutoEP gives its routers, each with the first one."""
    known = set(names)
    found: dict[str, str] = {}
    for name in known:
        for prefix in layers:
            layer = prefix.removesuffix("experts")
            rest = name.removeprefix(layer).partition(".")[2]
            owner = f"{layer}router.{rest}"
            if name.startswith(layer) and owner in known and owner != name:
                found[name] = owner
    return found
