"""Pipeline checkpoints: one ``layer_XX-model_states.pt`` per layer, the optimizer per stage.

A layer's number is its place in the whole list of layers; layers without weights and repeated tied
layers have no file. Stages name parameters ``{layer}.{name}``, tied ones ``tied_modules.{key}.
{name}``; those lie in the optimizer of every stage that uses them. After
``runtime/pipe/module.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import FormatError
from ..source import FileSource
from ..stored import lazy, plain
from ..tensor import LazyTensor
from . import autoep, neox, zero0
from .fields import Fields
from .folder import Folder, load, missing
from .grid import Grid, read_all
from .parts import Part, add_zero12
from .states import ModelState

NAMING = "deepspeed-pipeline"
_TIED = re.compile(r"^tied_modules\.([^.]+)\.(.+)$")


def read_layers(folder: Folder, tp: int) -> list[dict[str, LazyTensor]]:
    """Return the 16-bit weights ``{layer}.{name}`` of all layers, for each tensor-parallel rank.

    Raises:
        FormatError: a layer file is missing or damaged.
    """
    axis = any("-model_0" in p.name or "-model_1" in p.name for p in folder.layers.values())
    numbers = sorted({layer for layer, _ in folder.layers})
    names = [
        f"layer_{n:02d}-model_{t:02d}-model_states.pt" if axis else f"layer_{n:02d}-model_states.pt"
        for n in numbers
        for t in range(tp)
    ]
    why = f"{tp} tensor-parallel ranks"
    missing(folder, names, [p.name for p in folder.layers.values()], why)
    found: list[dict[str, LazyTensor]] = []
    for t in range(tp):
        paths = [folder.layers[n, t] for n in numbers]
        table: dict[str, LazyTensor] = {}
        for n, path, root in zip(
            numbers, paths, read_all(paths, lambda p: load(p).root), strict=True
        ):
            source, f = FileSource.of(path), Fields(path, root)
            for name, stored in f.tensors(f.data, "layer").items():
                table[f"{n}.{name}"] = lazy(stored, source)
        found.append(table)
    return found


def stages(grid: Grid, tp: int) -> list[Part]:
    """Return one part per tensor-parallel rank, put together over the pipeline stages.

    Raises:
        FormatError: missing layer files, or parameters that no file holds.
    """
    layers = read_layers(grid.folder, tp)
    found = []
    for t in range(tp):
        part = Part(weights=dict(layers[t]))
        rest = list(part.weights)
        for mp in range(t, len(grid.models), tp):
            stage = Part(weights=part.weights)
            if grid.optims[mp]:
                add_zero12(stage, grid.models[mp][0], grid.optims[mp])
            else:
                _add_zero0(stage, grid.models[mp][0], rest)
            _join(part, stage)
        _name_tied(part)
        _check_layers(grid, part)
        found.append(part)
    return found


def _join(part: Part, stage: Part) -> None:
    """Add a stage's optimizer; tied weights are in several, and equal."""
    for state, tensors in stage.optimizer.items():
        known = part.optimizer.setdefault(state, {})
        known.update({n: x for n, x in tensors.items() if n not in known})
    part.warnings += [w for w in stage.warnings if w not in part.warnings]
    old, new = (p.scalars.get("param_groups") for p in (part, stage))
    if not part.scalars:
        part.scalars = stage.scalars
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        part.scalars["param_groups"] = [
            {**a, "params": [*a["params"], *b["params"]]} for a, b in zip(old, new, strict=True)
        ]


def _add_zero0(stage: Part, model: ModelState, rest: list[str]) -> None:
    """Add the optimizer of a stage without ZeRO, which lies in its model file.

    Its parameters are those that the file lists (mconv's does), else as many of the next layers'
    (``rest``, from which they are taken) as it has.
    """
    weights: dict[str, LazyTensor] = {}
    for name, shape in ((n, s) for g in model.groups or () for n, s in g.items()):
        inner = match[2] if (match := _TIED.match(name)) else name.partition(".")[2]
        same = (w for n, w in stage.weights.items() if n.partition(".")[2] == inner)
        found = next((w for w in same if w.shape == shape), None)
        if found is not None:
            weights[name] = found
    if not model.groups and model.fields.get("optimizer") is not None:
        f = model.fields.sub("optimizer")
        f = f.sub("optimizer_state_dict") if "optimizer_state_dict" in f.data else f
        count = sum(len(g["params"]) for g in plain(f.get("param_groups")) or ())
        weights = {n: stage.weights[n] for n in rest[:count]}
        del rest[:count]
    stage.optimizer, stage.scalars, stage.warnings = zero0.read_optimizer(model, weights)


def stage_record(grid: Grid, tp: int) -> dict[str, Any] | None:
    """What the optimizers tell about the cut: layers with weights of every stage, and the stages
    that hold each tied module. None where the files do not list parameters.
    """
    layers: list[list[int]] = []
    tied: dict[str, list[int]] = {}
    for stage, mp in enumerate(range(0, len(grid.models), tp)):
        groups = grid.models[mp][0].groups
        if not groups:
            return None
        found: set[int] = set()
        for name in (n for group in groups for n in group):
            match = _TIED.match(name)
            if match is None:
                found.add(int(name.partition(".")[0]))
            elif stage not in tied.setdefault(match[1], []):
                tied[match[1]].append(stage)
        layers.append(sorted(found))
    return {"stages": layers, "tied": tied}


def _name_tied(part: Part) -> None:
    """Give the first layer that owns a tied weight the name its optimizer has for it."""
    masters = part.optimizer.get("master") or next(iter(part.optimizer.values()), {})
    for name, master in masters.items():
        match = _TIED.match(name)
        if match is None:
            continue
        layer = next(
            (
                n
                for n, w in part.weights.items()
                if n not in masters and n.partition(".")[2] == match[2] and w.shape == master.shape
            ),
            None,
        )
        if layer is not None:
            part.weights = {(name if n == layer else n): w for n, w in part.weights.items()}
            part.tied[layer] = name


def _check_layers(grid: Grid, part: Part) -> None:
    for name, master in part.optimizer.get("master", {}).items():
        weight = part.weights.get(name)
        if weight is None:
            layer = name.partition(".")[0]
            which = f"layer_{int(layer):02d}*" if layer.isdigit() else "the layer of a tied weight"
            raise FormatError(
                f"{grid.folder.path}: the optimizer has {name!r}, but no layer file holds it: "
                f"{which} is missing; copy it from the node that wrote it"
            )
        if weight.shape != master.shape:
            raise FormatError(
                f"{grid.folder.path}: {name!r} has shape {master.shape} in the optimizer and "
                f"{weight.shape} in its layer file: files of different models are mixed"
            )


def naming_of(weights: Iterable[str]) -> str:
    """``hf`` when the names are those of a Hugging Face model (or a PEFT wrapper of one)."""
    names = list(weights)
    if neox.is_neox(names):
        return neox.NAMING
    if autoep.is_autoep(names):
        return autoep.NAMING
    if any(n[:1].isdigit() for n in names):
        return NAMING
    megatron = any(".self_attention.query_key_value" in n for n in names)
    return "megatron-deepspeed" if megatron else "hf"


def hf_names(weights: Mapping[str, LazyTensor], tied: Mapping[str, str]) -> dict[str, str] | None:
    """Return the Hugging Face names of a pipeline of Hugging Face layers, or None.

    Recognises the usual list: embedding, decoder layers (``self_attn.q_proj``...), norm, head.
    """
    places = {n: n for n in weights} | {owner: layer for layer, owner in tied.items()}
    layers: dict[int, list[str]] = {}
    for name in weights:
        place = places[name].partition(".")[0]
        if not place.isdigit():
            return None
        layers.setdefault(int(place), []).append(name)
    blocks = sorted(k for k, ns in layers.items() if any(".self_attn." in places[n] for n in ns))
    if not blocks:
        return None
    found: dict[str, str] = {}
    for number, names in layers.items():
        if number in blocks:
            prefix = f"model.layers.{blocks.index(number)}"
            found |= {n: f"{prefix}.{places[n].partition('.')[2]}" for n in names}
            continue
        outer = _outer(number, names, weights, blocks)
        if outer is None:
            return None
        found |= outer
    return found


def _outer(
    number: int, names: Sequence[str], weights: Mapping[str, LazyTensor], blocks: Sequence[int]
) -> dict[str, str] | None:
    """Names of the layers before and after the blocks: one tensor each, told by rank and place."""
    if len(names) != 1:
        return None
    kind = (weights[names[0]].ndim, number > max(blocks), min(blocks) < number < max(blocks))
    known = {
        (2, False, False): "model.embed_tokens.weight",
        (1, True, False): "model.norm.weight",
        (2, True, False): "lm_head.weight",
    }
    return {names[0]: known[kind]} if kind in known else None
