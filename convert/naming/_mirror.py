"""Worlds that mirror Hugging Face's names one by one, such as its own Flax and TensorFlow models.

Each name has one counterpart, each tensor is the same or its transpose; so no table is needed but a
function, and what most layers have, all must have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ...shardio.tensor import LazyTensor
from ..movement import transpose
from .record import Model, Request

_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")
_SHOWN = 6
#: foreign name -> Hugging Face name and whether the tensor is transposed; None: left out
Mirror = Callable[[str], tuple[str, bool] | None]


def mirrored(ckpt: Checkpoint, mirror: Mirror) -> Checkpoint:
    """Return the checkpoint under Hugging Face names, weights and optimizer states alike.

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
        new, turned = found
        if new in out:
            raise ConfigError(f"{ckpt.path}: {name} and another tensor both become {new}")
        out[new] = transpose(tensor) if turned else tensor
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
        if 2 * len(there) > count:
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
