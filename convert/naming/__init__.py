"""Between Hugging Face tensor names and those of training frameworks, in both directions.

``to_hf`` and ``from_hf`` rename and refuse, fuse or split weights and optimizer states by the same
declarative table. Each module of this folder with a ``NAMING`` is one foreign world; dropping a
file there adds one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ...errors import ConfigError, counted, did_you_mean
from ...shardio.checkpoint import Checkpoint
from ...shardio.state_checkpoint import LateMapping
from ...shardio.tensor import LazyTensor
from .record import Model, Naming, Request

__all__ = ["from_hf", "namings", "to_hf"]

HF = "hf"


@lru_cache(maxsize=1)
def namings() -> Mapping[str, Naming]:
    """All foreign worlds by name."""
    found: dict[str, Naming] = {}
    for module in pkgutil.iter_modules(__path__):
        naming = getattr(importlib.import_module(f"{__name__}.{module.name}"), "NAMING", None)
        if isinstance(naming, Naming):
            found[naming.name] = naming
    return found


def _naming(name: str) -> Naming:
    known = namings()
    if name not in known:
        raise ConfigError(
            f"tensor names of the kind {name!r} cannot be translated{did_you_mean(name, known)}; "
            f"known: {', '.join(['hf', *sorted(known)])}"
        )
    return known[name]


def to_hf(
    ckpt: Checkpoint, *, vocab_size: int | None = None, model_type: str | None = None
) -> Checkpoint:
    """Return the checkpoint with Hugging Face names, shapes and config. Reads nothing.

    Optimizer states are renamed and split as the weights are. Replicas and placements belong to
    the foreign names and are dropped: compare the former before.

    Args:
        ckpt: any checkpoint; one that has Hugging Face names already comes back as it is.
        vocab_size: true vocabulary size, where the checkpoint pads it; else that of the config.
        model_type: Hugging Face model type, where the checkpoint does not tell.

    Raises:
        ConfigError: names without translation, tensors missing for the model, an unknown
            vocabulary size or model type.
    """
    if ckpt.naming == HF:
        return ckpt
    naming = _naming(ckpt.naming)
    request = Request(vocab_size=vocab_size, model_type=model_type)
    restored = naming.restore(ckpt, request)
    if restored is not None:
        return restored
    model = naming.describe(ckpt, request)
    weights, dropped = _without(ckpt.weights, model.left_out)
    warnings = [*ckpt.warnings, *model.warnings]
    if dropped:
        warnings.append(
            f"{counted(len(dropped), 'tensor')} left out, without a place in a Hugging Face "
            f"{model.table.name} model: {', '.join(dropped[:3])}{'...' if len(dropped) > 3 else ''}"
        )
    states = {
        state: model.table.to_hf(_without(tensors, model.left_out)[0], model.sizes, state)
        for state, tensors in ckpt.optimizer.items()
    }
    tied = {_renamed(model, a, True): _renamed(model, o, True) for a, o in ckpt.tied.items()}
    tied = {a: o for a, o in tied.items() if a != o}  # two foreign names of one tensor
    return replace(
        ckpt,
        naming=HF,
        weights=model.table.to_hf(weights, model.sizes),
        optimizer=states,
        scalars=LateMapping(lambda: _renamed_groups(model, ckpt.scalars, forward=True)),
        config=model.config,
        placements={},
        replicas={},
        tied=tied,
        warnings=tuple(warnings),
    )


def from_hf(ckpt: Checkpoint, naming: str, *, padded_vocab_size: int | None = None) -> Checkpoint:
    """Return the checkpoint with the names, fusions and settings of a foreign world.

    The inverse of ``to_hf``: bit for bit, except that vocabulary rows which ``to_hf`` trimmed come
    back as zeros.

    Args:
        ckpt: a checkpoint with Hugging Face names and a config.
        naming: the foreign world, such as ``megatron``.
        padded_vocab_size: rows that its embedding shall have (None: the true size).

    Raises:
        ConfigError: no config, an unknown model type, tensors that do not fit.
    """
    if ckpt.naming == naming:
        return ckpt
    if ckpt.naming != HF:
        return from_hf(to_hf(ckpt), naming, padded_vocab_size=padded_vocab_size)
    if naming == HF:
        return ckpt
    model = _naming(naming).plan(ckpt, Request(padded_vocab_size=padded_vocab_size))
    states = {
        state: model.table.from_hf(tensors, model.sizes, state)
        for state, tensors in ckpt.optimizer.items()
    }
    tied = {_renamed(model, a, False): _renamed(model, o, False) for a, o in ckpt.tied.items()}
    return replace(
        ckpt,
        naming=naming,
        weights=model.table.from_hf(ckpt.weights, model.sizes),
        optimizer=states,
        scalars=LateMapping(lambda: _renamed_groups(model, ckpt.scalars, forward=False)),
        args=model.args,
        placements={},
        replicas={},
        tied=tied,
        warnings=(*ckpt.warnings, *model.warnings),
    )


def _without(
    tensors: Mapping[str, LazyTensor], prefixes: tuple[str, ...]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Return the tensors whose names do not start so, and the names of the others."""
    kept = {n: t for n, t in tensors.items() if not n.startswith(prefixes)}
    return kept, [n for n in tensors if n not in kept]


def _renamed_groups(model: Model, scalars: Mapping[str, Any], *, forward: bool) -> dict[str, Any]:
    """The scalars, with parameter groups that list weights under their new names."""
    groups = scalars.get("param_groups")
    if not isinstance(groups, (list, tuple)):
        return dict(scalars)
    taken: set[str] = set()
    found: list[Any] = []
    for group in groups:
        listed = group.get("params") if isinstance(group, Mapping) else None
        if isinstance(listed, (list, tuple)) and all(isinstance(n, str) for n in listed):
            names = model.table.counterparts(listed, model.sizes, forward=forward)
            own = [n for n in names if n not in taken]  # a fused weight is in its first part's
            taken.update(own)
            group = {**{k: v for k, v in group.items() if k != "param_names"}, "params": own}
        found.append(group)
    return {**scalars, "param_groups": found}


def _renamed(model: Model, name: str, forward: bool) -> str:
    new = model.table.rename(name, forward=forward)
    if new is None:
        raise ConfigError(f"tied tensor {name} has no counterpart in the other naming")
    return new
