"""FSDP1 ``LOCAL_STATE_DICT``: flat vectors, without the names and shapes of what is in them.

The files do not tell how to cut the vectors. Two things do: ``flat_meta*.json`` beside them (the
``_fqns`` and ``_shapes`` of each ``FlatParamHandle``, as some training codes save them), or a
config.json of a known model, on the assumption that each FSDP unit is a module whose parameters
follow in the order in which the model defines them. Either must account for every element. Source:
torch ``distributed/fsdp/_flat_param.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ..errors import FormatError, LayoutError, UnsupportedError
from .assets import load_json
from .hf_parameters import parameters_of
from .names import strip_wrappers
from .tensor import LazyTensor

_SIDE = "flat_meta*.json"
Shapes = Mapping[str, tuple[int, ...]]
Plan = dict[str, dict[str, tuple[int, ...]]]  # unit: {parameter: shape}


def is_flat(name: str) -> bool:
    """Whether a tensor of a state dict is a unit's vector."""
    return name.rpartition(".")[2].endswith("flat_param")


def unflatten(
    vectors: Mapping[str, LazyTensor],
    root: Path,
    world: int,
    config: Mapping[str, Any] | None,
) -> tuple[dict[str, LazyTensor], str]:
    """Return (tensors by parameter name, the assumption in words).

    Args:
        vectors: whole 1-D vectors (all ranks joined) by name; others are passed on.
        root: folder of the rank files.
        world: number of ranks; a vector is padded to a multiple of it.
        config: Hugging Face config.json, or None.

    Raises:
        UnsupportedError: neither side metadata nor a config of a known model.
        LayoutError: sizes that do not fit.
        FormatError: malformed side metadata.
    """
    units = {strip_wrappers(n)[: -len(n.rpartition(".")[2])].rstrip("."): t
             for n, t in vectors.items() if is_flat(n)}  # fmt: skip
    side = sorted(root.glob(_SIDE))
    if side:
        plan = _from_side(side, units)
        note = f"flat FSDP1 vectors are cut as {side[0].name} says"
    elif config is not None and (known := parameters_of(config)):
        plan = _from_config(known, units)
        note = (
            "flat FSDP1 vectors carry no names: it is assumed that every FSDP unit "
            f"({', '.join(repr(u) for u in list(units)[:3])}...) holds its parameters in the order "
            f"of the {config.get('model_type')} model; the sizes fit exactly, but have the result "
            "checked (--config can give another model)"
        )
    else:
        raise UnsupportedError(
            f"{root}: an FSDP1 LOCAL_STATE_DICT: flat vectors without names or shapes. Give the "
            "config.json of a Llama, Mistral, Qwen2 or Qwen3 model with --config, or save with "
            "SHARDED_STATE_DICT or FULL_STATE_DICT"
        )
    out = {n: t for n, t in vectors.items() if not is_flat(n)}
    for unit, tensor in units.items():
        out |= _cut(root, unit, tensor, plan[unit], world)
    return out, note


def _cut(
    root: Path, unit: str, vector: LazyTensor, shapes: Shapes, world: int
) -> dict[str, LazyTensor]:
    need = sum(prod(s) for s in shapes.values())
    if not need <= vector.size < need + max(world, 1):
        raise LayoutError(
            f"{root}: the vector of unit {unit!r} has {vector.size} elements, its parameters need "
            f"{need} (and at most {world - 1} of padding): another model or another way of wrapping"
        )
    found: dict[str, LazyTensor] = {}
    at = 0
    for name, shape in shapes.items():
        size = prod(shape)
        found[name] = vector.slice([slice(at, at + size)]).reshape(shape)
        at += size
    return found


def _from_side(
    files: Iterable[Path], units: Iterable[str]
) -> dict[str, dict[str, tuple[int, ...]]]:
    plan: Plan = {}
    for path in files:
        tree = load_json(path)
        for key, info in tree.items() if isinstance(tree, dict) else ():
            try:
                names = [strip_wrappers(str(n)) for n in info["fqns"]]
                shapes = [tuple(int(n) for n in s) for s in info["shapes"]]
                cut = dict(zip(names, shapes, strict=True))
            except (KeyError, TypeError, ValueError) as e:
                raise FormatError(f"{path}: {key!r} has no fqns and shapes ({e})") from e
            unit = strip_wrappers(key).rpartition(".")[0]
            if plan.setdefault(unit, cut) != cut:
                raise FormatError(f"{path}: describes {key!r} otherwise than the files before it")
    lost = [u for u in units if u not in plan]
    if lost:
        raise FormatError(f"{next(iter(files))}: does not describe the unit {lost[0]!r}")
    return plan


def _from_config(known: Shapes, units: Iterable[str]) -> Plan:
    """Give each parameter to the innermost unit that it lies in."""
    plan: Plan = {u: {} for u in units}
    inner_first = sorted(plan, key=len, reverse=True)
    for name, shape in known.items():
        unit = next((u for u in inner_first if not u or name.startswith(f"{u}.")), None)
        if unit is None:
            raise LayoutError(f"no FSDP unit holds {name}: another model or way of wrapping")
        plan[unit][name] = shape
    return plan
