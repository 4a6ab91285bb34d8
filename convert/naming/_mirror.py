"""Worlds that mirror Hugging Face's names one by one, such as its own Flax and TensorFlow models.

Each name has one counterpart, each tensor is the same or its transpose; so no table is needed but a
function, and what most layers have, all must have. Config.json is the user's or made by the naming.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ...shardio.tensor import LazyTensor
from .record import Model, Request

_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")
_ONCE = "relative_attention_bias"  # of T5, in the first layer only
_SHOWN = 6
Step = Callable[[LazyTensor], LazyTensor]
#: foreign name -> Hugging Face name and what is done to the tensor; None: left out
Mirror = Callable[[str], tuple[str, Step] | None]


def same(tensor: LazyTensor) -> LazyTensor:
    """The tensor as it is."""
    return tensor


def squeezed(tensor: LazyTensor) -> LazyTensor:
    """The tensor without leading dims of one."""
    shape = tensor.shape
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return tensor.reshape(shape)


def mirrored(
    ckpt: Checkpoint, mirror: Mirror, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Return the checkpoint under Hugging Face names, weights and optimizer states alike.

    Args:
        ckpt: with foreign names.
        mirror: what becomes of each.
        config: config.json, where the checkpoint's own is not one.

    Raises:
        ConfigError: two tensors become one, or layers lack what the others have.
    """
    weights = _renamed(ckpt, ckpt.weights, mirror)
    lost = _gaps(weights)
    if lost:
        raise ConfigError(
            f"{ckpt.path}: {len(lost)} tensors are missing that the other layers have: "
            f"{', '.join(lost[:_SHOWN])}{'...' if len(lost) > _SHOWN else ''}"
        )
    dropped = [n for n in ckpt.weights if mirror(n) is None]
    notes = (f"{len(dropped)} tensors are left out, such as {dropped[0]}",) if dropped else ()
    return replace(
        ckpt,
        naming="hf",
        config=ckpt.config if config is None else config,
        weights=weights,
        optimizer={s: _renamed(ckpt, t, mirror) for s, t in ckpt.optimizer.items()},
        placements={},
        replicas={},
        warnings=(*ckpt.warnings, *notes),
    )


def _renamed(
    ckpt: Checkpoint, tensors: Mapping[str, LazyTensor], mirror: Mirror
) -> dict[str, LazyTensor]:
    out: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found = mirror(name)
        if found is None:
            continue
        new, step = found
        if new in out:
            raise ConfigError(f"{ckpt.path}: {name} and another tensor both become {new}")
        out[new] = step(tensor)
    return out


def _gaps(weights: Mapping[str, LazyTensor]) -> list[str]:
    """Names that the numbering of layers lacks."""
    patterns: dict[str, set[int]] = {}
    stems: dict[str, int] = {}
    for name in weights:
        m = _LAYER.search(name)
        if m and len(m[1]) < 5:
            patterns.setdefault(f"{name[: m.start()]}{{}}{name[m.end() :]}", set()).add(int(m[1]))
            stem = name[: m.start()]
            stems[stem] = max(stems.get(stem, -1), int(m[1]))
    lost = []
    for pattern, there in patterns.items():
        count = stems[pattern.partition("{}")[0]] + 1
        if 2 * len(there) >= count and _ONCE not in pattern:
            lost += [pattern.format(i) for i in range(count) if i not in there]
    return lost


def keep_names(ckpt: Checkpoint, request: Request) -> Checkpoint:
    """The checkpoint as it is, for names of no known code."""
    some = ", ".join(list(ckpt.weights)[:3])
    note = (
        f"the tensor names ({some}...) belong to no code that mconv knows: they are kept, and no "
        "tensor is transposed"
    )
    return replace(ckpt, naming="hf", warnings=(*ckpt.warnings, note))


def not_written(title: str) -> Callable[[Checkpoint, Request], Model]:
    """A naming's ``plan`` where mconv only reads."""

    def plan(ckpt: Checkpoint, request: Request) -> Model:
        raise ConfigError(f"{ckpt.path}: {title} names are read, not written")

    return plan


def not_described(title: str) -> Callable[[Checkpoint, Request], Model]:
    """A naming's ``describe`` where ``restore`` does it all."""

    def describe(ckpt: Checkpoint, request: Request) -> Model:
        raise ConfigError(f"{ckpt.path}: {title} names have no table")

    return describe
