"""Optimizer states of Megatron's distributed checkpoints, brought under the weights' names.

Source: ``megatron/core/optimizer/distrib_optimizer.py``. ``optimizer.state.<state>.<model key>``
(plain optimizers, fully reshardable) has the layout of the weights. The default ``dp_reshardable``
saves the flat buffers of each model-parallel rank instead, without names (see ``dist_buffers``).
Other layouts are left out with a warning; the weights do not depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import UnsupportedError
from ..checkpoint import Tensors
from ..stored import plain
from ..tensor import LazyTensor
from .container import Container, object_of
from .dist_buffers import BUFFER, from_buffers
from .optimizer import Optimizer
from .settings import Sizes
from .stacked import unstack

OPTIMIZER = re.compile(r"^(?:chained_\d+\.)?optimizer\.")
_STATE = re.compile(r"^(?:chained_\d+\.)?optimizer\.(?:chained_\d+\.)?state\.(\w+)\.(.+)$")
_GROUPS = re.compile(r"^(?:chained_\d+\.)?optimizer\..*optimizer/shard_0_1$")
_NAMES = {
    "param": "master",
    "fp32_param": "master",
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
}


def read_optimizer(
    container: Container, weights: Tensors, args: Mapping[str, object], sizes: Sizes
) -> Optimizer:
    """Read the optimizer states.

    Raises:
        FormatError: damaged files.
    """
    scalars = _scalars(container)
    try:
        states = _by_key(container, weights, sizes)
        if not states and any(BUFFER.match(key) for key in container.tensors):
            states = from_buffers(container.tensors, weights, args, sizes)
        left = [
            k
            for k in container.tensors
            if OPTIMIZER.match(k) and not _STATE.match(k) and not BUFFER.match(k)
        ]
        if left:
            raise UnsupportedError(f"unknown optimizer keys such as {left[0]}")
    except UnsupportedError as e:
        return Optimizer(scalars=scalars, warnings=(f"optimizer states are left out: {e}",))
    return Optimizer(states, scalars)


def _by_key(
    container: Container, weights: Tensors, sizes: Sizes
) -> dict[str, dict[str, LazyTensor]]:
    stacked: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in container.tensors.items():
        m = _STATE.match(key)
        if m and m[1] != "step":
            stacked.setdefault(_NAMES.get(m[1], m[1]), {})[m[2]] = tensor
    states: dict[str, dict[str, LazyTensor]] = {}
    for state, tensors in stacked.items():
        found = states[state] = unstack(tensors, sizes.layers)
        for name, own in found.items():
            if name not in weights or own.shape != weights[name].shape:
                shape = weights[name].shape if name in weights else "no such tensor"
                raise UnsupportedError(
                    f"{state} of {name} has shape {own.shape}, the model has {shape} (flattened "
                    "ranges of core 0.12 to 0.14?)"
                )
    return states


def _scalars(container: Container) -> dict[str, object]:
    found: dict[str, object] = {}
    schedule = container.common.get("opt_param_scheduler")
    if schedule is not None:
        found["opt_param_scheduler"] = plain(schedule)
    groups: list[object] = []
    for part in _chained(plain(container.common.get("optimizer"))):
        groups += _groups_of(part)
        if "param_state_sharding_type" in part:
            found["param_state_sharding_type"] = part["param_state_sharding_type"]
    if groups:
        found["param_groups"] = groups
    key = next((k for k in container.objects if _GROUPS.match(k)), None)
    if key is not None and "param_groups" not in found:
        value = plain(object_of(container, key))
        if isinstance(value, dict) and "param_groups" in value:
            found["param_groups"] = value["param_groups"]
    return found


def _chained(common: object) -> list[dict[str, Any]]:
    """The optimizers of a run: one, or numbered ones for dense parameters and experts."""
    if not isinstance(common, dict):
        return []
    numbered = [v for k, v in sorted(common.items()) if k.isdigit() and isinstance(v, dict)]
    return numbered or [common]


def _groups_of(part: Mapping[str, Any]) -> list[object]:
    """Parameter groups; the plain optimizers save one step beside them."""
    inner = part.get("optimizer", part)
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    if not isinstance(groups, list):
        return []
    state = inner.get("state")
    step = state.get("common_step") if isinstance(state, dict) else None
    return groups if step is None else [{**g, "step": step} for g in groups if isinstance(g, dict)]
