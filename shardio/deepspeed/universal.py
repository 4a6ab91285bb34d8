"""Universal checkpoints, what ``ds_to_universal`` writes: one folder per parameter.

``zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt`` holds whole tensors, put together over every
kind of parallelism (under ZeRO-3 flat, with the shape in the model files only); copies of the model
files hold buffers and frozen parameters. After ``deepspeed/checkpoint/ds_to_universal.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from ...errors import FormatError
from ..checkpoint import Checkpoint
from ..layout import Layout
from ..names import stripped
from ..records import StoredTensor
from ..registry import OpenOptions
from ..source import FileSource
from ..state_checkpoint import model_files
from ..stored import lazy, plain
from ..tensor import LazyTensor
from ..torchfile import open_torch_file
from . import zero3
from .combine import merged, rules_of
from .fields import Fields, Shape
from .folder import scan
from .grid import read_all
from .parts import Part, read_module
from .pipeline import hf_names, naming_of
from .states import ModelState, read_model, same_step

FORMAT = "deepspeed-universal"
_MASTER = "fp32"
_NO_TENSORS = frozenset({"step"})


class ParameterFiles(Mapping[str, LazyTensor]):
    """One state of all parameters; a file is opened when its tensor is asked for."""

    def __init__(self, files: Mapping[str, Path], shapes: Mapping[str, Shape]) -> None:
        self._files = files
        self._shapes = shapes
        self._open: dict[str, LazyTensor] = {}

    def __getitem__(self, name: str) -> LazyTensor:
        if name not in self._open:
            self._open[name] = read_parameter(self._files[name], self._shapes.get(name))
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def is_universal(path: Path) -> bool:
    """Whether a folder is a universal checkpoint. Never raises."""
    try:
        return any((child / f"{_MASTER}.pt").is_file() for child in (path / "zero").iterdir())
    except OSError:
        return False


def open_universal(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a universal checkpoint folder.

    Raises:
        FormatError: parameters, states or model files are missing or damaged.
    """
    files = _states(root)
    models = _models(root)
    shapes = _shapes(models)
    _check(root, files, shapes)
    parameters = ParameterFiles(files[_MASTER], shapes)  # in the order of the model, not of names
    masters = {n: parameters[n] for n in dict.fromkeys([*shapes, *parameters])}
    config, assets = model_files(root, options)
    rest = _rest(models, masters, config)
    table = stripped([*masters, *rest.weights, *rest.tied])
    first = models[0] if models else None
    weights = {table[n]: t for n, t in {**masters, **rest.weights}.items()}
    renamed = {
        state: ParameterFiles(
            {table[n]: p for n, p in paths.items()},
            {table.get(n, n): s for n, s in shapes.items()},
        )
        for state, paths in files.items()
        if state != _MASTER
    }
    return Checkpoint(
        path=root,
        format=FORMAT,
        version=first.fields.text("ds_version") if first else None,
        naming=naming_of(weights),
        weights=weights,
        optimizer={"master": {table[n]: t for n, t in masters.items()}, **renamed},
        step=same_step(models),
        config=config,
        args=_args(first, weights, table),
        scalars=_scalars(root, first, table),
        layout=Layout(FORMAT),
        tied={table[a]: table.get(o, o) for a, o in rest.tied.items()},
        assets=assets,
        warnings=tuple(rest.warnings),
    )


def _args(
    first: ModelState | None, weights: Mapping[str, LazyTensor], table: Mapping[str, str]
) -> dict[str, object]:
    args: dict[str, object] = {}
    if first is not None:
        args = {"ds_config": first.config, "client_state": first.client()}
        args["buffer_names"] = [table.get(n, n) for n in first.buffers]
        args |= {"training_dtype": first.training_dtype} if first.training_dtype else {}
    names = hf_names(weights, {})
    return args | ({"hf_names": names} if names else {})


def _states(root: Path) -> dict[str, dict[str, Path]]:
    """Return state name to files by parameter."""
    found: dict[str, dict[str, Path]] = {}
    for folder in sorted((root / "zero").iterdir()):
        for file in sorted(folder.glob("*.pt")) if folder.is_dir() else ():
            if file.stem not in _NO_TENSORS:
                found.setdefault(file.stem, {})[folder.name] = file
    return found


def _models(root: Path) -> list[ModelState]:
    folder = scan(root)
    paths = [folder.models[m] for m in sorted(folder.models)]
    if not paths:  # else they say the same without the weights
        paths = [folder.shards[k] for k in sorted(folder.shards, key=lambda k: (k[1], k[0]))]
    return read_all(paths, read_model)


def _shapes(models: list[ModelState]) -> dict[str, Shape]:
    return {n: s for m in models for group in m.groups or () for n, s in group.items()}


def _check(
    root: Path, files: Mapping[str, Mapping[str, Path]], shapes: Mapping[str, Shape]
) -> None:
    masters = files.get(_MASTER, {})
    for state, table in files.items():
        wanted = {*masters, *shapes} if state == _MASTER else set(masters)
        gone = sorted(wanted - table.keys())
        if gone:
            shown = ", ".join(f"zero/{n}/{state}.pt" for n in gone[:4])
            raise FormatError(
                f"{root}: {len(gone)} parameter files missing: {shown}; the conversion or the copy "
                "did not finish"
            )


def read_parameter(path: Path, shape: Shape | None) -> LazyTensor:
    """Return the tensor of one parameter file.

    Args:
        path: ``fp32.pt`` or another state.
        shape: for files that hold a flat vector.

    Raises:
        FormatError: no tensor in it, or one that does not fit the shape.
    """
    root = open_torch_file(path).root
    stored = root.get("param") if isinstance(root, dict) else root
    if type(stored) is not StoredTensor:
        raise FormatError(f"{path}: holds no tensor: not a file of a universal checkpoint")
    tensor = lazy(stored, FileSource.of(path))
    if isinstance(root, dict):
        return tensor
    if shape is None:
        raise FormatError(
            f"{path}: a flat vector, and no model file says its shape; copy the "
            "*_model_states.pt files of the checkpoint beside the zero folder"
        )
    if tensor.size != prod(shape):
        raise FormatError(
            f"{path}: {tensor.size} elements, but the model files say shape {shape}: the files "
            "are of different models"
        )
    return tensor.reshape(shape)


def _rest(
    models: list[ModelState], masters: Mapping[str, LazyTensor], config: Mapping[str, object] | None
) -> Part:
    """Buffers, frozen parameters and ties, from the copies of the model files."""
    if not models:
        return Part(warnings=["no model files beside the zero folder: buffers, frozen and tied "
                              "weights are unknown"])  # fmt: skip
    first = models[0]
    if first.frozen is not None and first.module is not None and not _has_data(first):
        part = Part(weights=zero3.read_frozen(models))
        names = {n: first.module[n] for n in first.buffers if n in first.module}
        part.weights.update({n: lazy(t, first.source) for n, t in names.items()})
        part.tied = {a: o for a, o in first.shared.items() if o in masters or o in part.weights}
        return part
    parts = []
    for model in models:
        part = Part()
        read_module(part, model)
        part.weights = {n: w for n, w in part.weights.items() if n not in masters}
        parts.append(part)
    if len(parts) == 1 or not parts[0].weights:
        return parts[0]
    return merged(parts, rules_of(first, None, config), len(parts), 1).part


def _has_data(model: ModelState) -> bool:
    """Whether ``module`` holds weights: stage 3 leaves placeholders."""
    names = [n for n in model.module or {} if n not in model.buffers]
    return any((model.module or {})[n].numel > 1 for n in names)


def _scalars(root: Path, first: ModelState | None, table: Mapping[str, str]) -> dict[str, object]:
    """Hyper-parameters and schedule; groups name their weights where the model file lists them."""
    found: dict[str, object] = {}
    if first is not None:
        found["lr_scheduler"] = first.fields.plain("lr_scheduler")
    path = root / "zero" / "optimizer_state.pt"
    if path.is_file():
        f = Fields(path, open_torch_file(path).root)
        for key in ("base_optimizer_state", "optimizer_state_dict"):
            inner = f.mapping(key)
            if inner is not None and "param_groups" in inner:
                found["param_groups"] = plain(inner["param_groups"])
        groups = f.plain("param_groups") or found.get("param_groups")
        if isinstance(groups, list):
            found["param_groups"] = _named(groups, (first and first.groups) or (), table)
        found["loss_scaler"] = f.plain("loss_scaler")
    return {k: v for k, v in found.items() if v is not None}


def _named(
    groups: list[object], tables: tuple[dict[str, Shape], ...], table: Mapping[str, str]
) -> list[object]:
    if len(groups) != len(tables) or any(n not in table for t in tables for n in t):
        return groups
    return [
        {**g, "params": [table[n] for n in names]} if isinstance(g, dict) else g
        for g, names in zip(groups, tables, strict=True)
    ]
