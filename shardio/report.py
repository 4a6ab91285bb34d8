"""What ``mconv inspect`` tells: a checkpoint described as plain data, from its metadata alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import dtypes
from .checkpoint import Checkpoint
from .coverage import flaws
from .tensor import LazyTensor


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One tensor in the report.

    Attributes:
        name: as the framework has it.
        shape: global shape.
        dtype: name of the element type.
        placement: how the mesh axes cut it (``tp Shard(0), pp Stage(1)``), empty when whole.
        pieces: number of file ranges it is made of.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    placement: str
    pieces: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint described.

    Attributes:
        path, format, version, naming, step: as in ``Checkpoint``.
        layout: sizes of the parallel axes in use.
        files: number of files the weights lie in.
        nbytes: bytes of the weights.
        parameters: elements of the weights.
        dtypes: dtype name to elements.
        optimizer: state name to number of tensors.
        tied: alias to owner.
        frozen: weights without optimizer state, when the others have one.
        problems: holes, overlaps, short files (empty: coverage is proven).
        warnings: what a user should know.
        config: model type and sizes, when a config.json was found.
        tensors: one line each.
    """

    path: Path
    format: str
    version: str | None
    naming: str
    step: int | None
    layout: Mapping[str, int]
    files: int
    nbytes: int
    parameters: int
    dtypes: Mapping[str, int]
    optimizer: Mapping[str, int]
    tied: Mapping[str, str]
    frozen: tuple[str, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    config: Mapping[str, Any]
    assets: tuple[str, ...]
    tensors: tuple[TensorLine, ...]

    @property
    def whole(self) -> bool:
        """Whether every element of every tensor is in exactly one place."""
        return not self.problems


_CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def inspect_checkpoint(ckpt: Checkpoint) -> Inspection:
    """Describe an opened checkpoint; reads no tensor bytes."""
    counts: Counter[str] = Counter()
    files: set[Path] = set()
    lines = []
    for name, tensor in ckpt.weights.items():
        counts[dtypes.name(tensor.dtype)] += tensor.size
        paths = [path for path, _, _ in tensor.spans()]
        files.update(paths)
        lines.append(_line(ckpt, name, tensor, len(paths)))
    problems = flaws(ckpt.weights)
    for state, tensors in ckpt.optimizer.items():
        problems += flaws({f"{state}.{n}": t for n, t in tensors.items()})
    trained = {n for tensors in ckpt.optimizer.values() for n in tensors}
    config = ckpt.config or {}
    return Inspection(
        path=ckpt.path,
        format=ckpt.format,
        version=ckpt.version,
        naming=ckpt.naming,
        step=ckpt.step,
        layout=ckpt.layout.sizes(),
        files=len(files),
        nbytes=sum(t.nbytes for t in ckpt.weights.values()),
        parameters=ckpt.num_parameters,
        dtypes=dict(counts.most_common()),
        optimizer={state: len(tensors) for state, tensors in ckpt.optimizer.items()},
        tied=dict(ckpt.tied),
        frozen=tuple(n for n in ckpt.weights if n not in trained) if trained else (),
        problems=tuple(f"{f.name}: {f.problem}" for f in problems),
        warnings=ckpt.warnings,
        config={k: config[k] for k in _CONFIG_KEYS if k in config},
        assets=tuple(p.name for p in ckpt.assets),
        tensors=tuple(lines),
    )


def _line(ckpt: Checkpoint, name: str, tensor: LazyTensor, pieces: int) -> TensorLine:
    cut = ckpt.placements.get(name, {})
    placement = ", ".join(f"{axis} {p}" for axis, p in cut.items())
    return TensorLine(name, tensor.shape, dtypes.name(tensor.dtype), placement, pieces)
