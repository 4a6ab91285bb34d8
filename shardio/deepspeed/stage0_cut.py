"""The optimizer entry of a model file without ZeRO: the inverse of ``zero0``.

fp32 training has a plain torch optimizer, numbered by parameter. In bf16 and fp16 training
``FP16_UnfusedOptimizer`` wraps one with a list of fp32 masters per group, or ``FP16_Optimizer``
wraps FusedAdam (told by its ``bias_correction``) with one vector per group. Source:
``runtime/fp16/{unfused,fused}_optimizer.py`` of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import FLOAT16, FLOAT32
from .flat_cut import FlatGroup
from .state_files import Source, optimizer_head

_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")


def stage0_optimizer(source: Source) -> dict[str, Any] | None:
    """What ``optimizer`` holds; None without optimizer states."""
    if not source.training.states:
        return None
    if source.dtype == FLOAT32:
        return _numbered(source)
    fused = any("bias_correction" in g.settings for g in source.training.groups)
    kind = "FusedAdam" if fused else "a torch optimizer"
    source.note(f"ZeRO stage 0 in 16 bits: written for {kind}, which loading demands")
    return _vectors(source) if fused else _lists(source)


def _numbered(source: Source) -> dict[str, Any]:
    """``state_dict()`` of a torch optimizer."""
    training = source.training
    number = {n: k for k, n in enumerate(training.trained)}
    table: dict[int, dict[str, Any]] = {}
    for name, k in number.items():
        state = {s: tensors[name] for s, tensors in training.states.items() if name in tensors}
        if state:
            table[k] = {"step": np.array(training.step, np.float32), **state}
    groups = [{**g.settings, "params": [number[n] for n in g.names]} for g in training.groups]
    return {"state": table, "param_groups": groups}


def _lists(source: Source) -> dict[str, Any]:
    """``state_dict()`` of ``FP16_UnfusedOptimizer``."""
    masters = source.training.masters
    return {
        **_scaling(source),
        "optimizer_state_dict": _numbered(source),
        "fp32_groups": [[masters[n] for n in g.names] for g in source.training.groups],
    }


def _vectors(source: Source) -> dict[str, Any]:
    """``state_dict()`` of ``FP16_Optimizer``; the optimizer inside sees a vector per group."""
    training, weights = source.training, source.ckpt.weights
    groups = [FlatGroup({n: weights[n].shape for n in g.names}, 1) for g in training.groups]
    table = {}
    for k, group in enumerate(groups):
        moments = {s: group.vector(t, 0, padded=False) for s, t in training.states.items()}
        table[k] = {"step": training.step, **moments}
    settings = [
        {**g.settings, "params": [k], "step": training.step} for k, g in enumerate(training.groups)
    ]
    return {
        **(_scaling(source) if source.dtype == FLOAT16 else {}),
        "optimizer_state_dict": {"state": table, "param_groups": settings},
        "fp32_groups_flat": [g.vector(training.masters, 0, padded=False) for g in groups],
        "clip_grad": optimizer_head(source).get("clip_grad", 0.0),
    }


def _scaling(source: Source) -> dict[str, Any]:
    head = optimizer_head(source)
    state: Mapping[str, Any] = head["loss_scaler"].state
    known = {k: state[k] for k in _SCALING if k in state}
    return {"dynamic_loss_scale": head["dynamic_loss_scale"], "cur_iter": 0, **known}
