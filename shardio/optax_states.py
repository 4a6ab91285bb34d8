"""Telling weights, optax states and counters of a JAX training state apart by their names.

Adam's moments are ``opt_state...mu.<parameter>`` and ``...nu.<parameter>``; the parameter lies
under ``params`` or ``model``. Source: optax ``transforms``, flax ``TrainState``, levanter
``trainer_state``.
"""

from __future__ import annotations

from collections.abc import Mapping

from .tensor import LazyTensor

_MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}
_COUNTERS = ("step", "global_step")


def told_apart(
    arrays: Mapping[str, LazyTensor],
) -> tuple[dict[str, LazyTensor], dict[str, dict[str, LazyTensor]], list[str]]:
    """Tell weights from optax states (``opt_state...mu.<parameter>``) and counters."""
    states = [n for n in arrays if n.split(".")[0].startswith("opt")]
    counters = [n for n in arrays if arrays[n].shape == () and n.rpartition(".")[2] in _COUNTERS]
    weights = {n: t for n, t in arrays.items() if n not in states and n not in counters}
    optimizer: dict[str, dict[str, LazyTensor]] = {}
    rest = list(counters)
    for name in states:
        words = name.split(".")
        moment = next((w for w in words if w in _MOMENTS), None)
        tail = ".".join(words[words.index(moment) + 1 :]) if moment else ""
        places = (tail, f"params.{tail}", tail.removeprefix("params."), f"model.{tail}")
        owner = next((n for n in places if n in weights), None)
        if owner is None or moment is None:
            rest.append(name)
            continue
        optimizer.setdefault(_MOMENTS[moment], {})[owner] = arrays[name]
    return weights, optimizer, rest


def step_of(arrays: Mapping[str, LazyTensor]) -> int | None:
    """Return the number of steps among the arrays, or None."""
    for name in _COUNTERS:
        tensor = arrays.get(name)
        if tensor is not None and tensor.shape == () and tensor.dtype.kind in "iu":
            return int(tensor.read().item())
    return None
