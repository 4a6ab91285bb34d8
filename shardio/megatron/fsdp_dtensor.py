"""Megatron-FSDP's ``fsdp_dtensor``: plain DCP whose keys differ from those of the other formats.

Gated ``linear_fc1`` is saved as two tensors, ``weight_w`` (gate) and ``weight_v`` (up), the
optimizer as ``optimizer.state.<parameter>.<state>``. Both come back as ``torch_dcp`` has them.
Source: ``megatron/core/transformer/fsdp_dtensor_checkpoint.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import FormatError
from ..chunked import Chunked
from ..tensor import concat

_HALF = re.compile(r"^(.*\.linear_fc1\.(?:weight|bias)\d*)_([wv])((?:\.\w+)?)$")
_STATE = re.compile(
    r"^(optimizer\.state)\.(.+\.\w+)\.(exp_avg|exp_avg_sq|fp32_param|master_param)$"
)
_WRAPPED = re.compile(r"^model\.(?:module\.)+")
_NAMES = {"master_param": "fp32_param"}


def usual_keys(tensors: Mapping[str, Chunked], folder: Path) -> dict[str, Chunked]:
    """Return the tensors under the usual keys, halves joined.

    Raises:
        FormatError: one half of a tensor is missing, or both do not fit.
    """
    halves: dict[str, dict[str, Chunked]] = {}
    found: dict[str, Chunked] = {}
    for key, tensor in tensors.items():
        if half := _HALF.match(key):
            halves.setdefault(half[1] + half[3], {})[half[2]] = tensor
        else:
            found[_usual(key)] = tensor
    for key, pair in halves.items():
        if len(pair) < 2:
            raise FormatError(
                f"{folder}: of {key} only the half _{next(iter(pair))} is there: the save is not "
                "whole"
            )
        gate, up = pair["w"], pair["v"]
        if gate.shape != up.shape or not gate.ndim:
            raise FormatError(f"{folder}: the halves of {key} are {gate.shape} and {up.shape}")
        joined = concat([gate, up])
        assert isinstance(joined, Chunked), "chunk lists join to chunk lists"
        found[_usual(key)] = joined
    return found


def _usual(key: str) -> str:
    state = _STATE.match(key)
    if state is None:
        return _WRAPPED.sub("model.", key)
    return f"{state[1]}.{_NAMES.get(state[3], state[3])}.{state[2]}"
