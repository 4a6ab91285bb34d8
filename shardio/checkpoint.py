"""A checkpoint: lazy weights and optimizer states by name, and plain data beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checksums import Checksum
from .layout import Layout
from .placement import Placement
from .tensor import LazyTensor

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What every reader returns and every writer takes.

    Attributes:
        path: folder (or file) that was opened.
        format: name of the on-disk format.
        version: version of the writing framework or format, where known.
        naming: the world its tensor names belong to (``hf``, ``megatron``, ``meta``, ...).
        weights: the model's tensors, names as the framework has them, wrapper prefixes stripped.
            Tied aliases are not here but in ``tied``.
        optimizer: state name (``exp_avg``, ``exp_avg_sq``, fp32 ``master``, ...) to tensors by
            weight name.
        step: optimizer steps taken, where saved.
        config: the Hugging Face ``config.json`` found with it, or None.
        args: the framework's own plain settings (Megatron args, DeepSpeed config...).
        scalars: optimizer hyper-parameters and schedule as plain data.
        layout: how it was cut.
        placements: weight name to {mesh axis: placement}, for those that are cut.
        replicas: weight name to further copies that must equal it.
        checksums: what the format's own index says about ranges of its files (those of archives are
            found in the files).
        tied: alias to the name that holds the tensor.
        assets: config, tokenizer and template files that belong to the model.
        warnings: what a user should know, in plain words.
    """

    path: Path
    format: str
    weights: Tensors
    version: str | None = None
    naming: str = "hf"
    optimizer: Mapping[str, Tensors] = field(default_factory=dict)
    step: int | None = None
    config: Mapping[str, Any] | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)
    placements: Mapping[str, Mapping[str, Placement]] = field(default_factory=dict)
    replicas: Mapping[str, tuple[LazyTensor, ...]] = field(default_factory=dict)
    checksums: tuple[Checksum, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    assets: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Elements of all weights (tied ones counted once)."""
        return sum(t.size for t in self.weights.values())
