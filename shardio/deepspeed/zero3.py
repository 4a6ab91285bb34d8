"""ZeRO stage 3: every parameter is flattened and cut into equal ranges, one per rank.

A rank's flat vector of a sub-group holds ceil(n / ranks) elements of each of its parameters, in
``param_shapes`` order without gaps. The end of the last range is uninitialised memory. The fp32
masters are the only copy of the trained weights; frozen parameters are cut in the same way in the
model files. Nothing inside a rank's vectors says which rank it is: swapped files show in the name
under which they were saved (``folder.load``) or in ``ds_zero_partition_groups`` (newest versions),
and in non-zip files of older versions not at all. After ``runtime/zero/stage3.py`` and
``partition_parameters.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np

from ...errors import FormatError, UnsupportedError
from ..flat_buffer import Part, Run, finish, from_runs
from ..records import StoredTensor
from ..stored import plain
from ..tensor import LazyTensor
from .fields import Shape
from .nvme import Swapped
from .states import ModelState, OptimState
from .zero12 import States


def per_rank(count: int, ranks: int) -> int:
    """Elements of a parameter that each rank holds."""
    return -(-count // ranks)


def rank_length(shapes: Mapping[str, Shape], world: int) -> int:
    """Elements of a sub-group that each rank holds."""
    return sum(per_rank(prod(s), world) for s in shapes.values())


def read_subgroup(
    index: int,
    shapes: Mapping[str, Shape],
    ranks: Sequence[OptimState],
    swapped: Swapped | None = None,
) -> States:
    """Return the masters and all other states of sub-group ``index``, by parameter.

    Args:
        index: of the sub-group.
        shapes: its parameters in flat order.
        ranks: optimizer files in dp order.
        swapped: the files of sub-groups that were kept on NVMe.

    Raises:
        FormatError: flat vectors that contradict the shapes, or missing swap files.
    """
    world = len(ranks)
    length = rank_length(shapes, world)
    names: dict[str, None] = {"master": None}
    for r in ranks:
        names |= dict.fromkeys(r.states[index])
    found: States = {}
    for name in names:
        if swapped is not None and index in swapped.ids and length:
            parts = [_swapped(swapped, index, name, r, length) for r in ranks]
        else:
            parts = [_vector(index, name, r, length, len(shapes), world) for r in ranks]
        if len({(p.dtype, p.swap) for p in parts}) > 1:
            raise FormatError(
                f"{ranks[0].path.parent}: {name} of sub-group {index} has different types on "
                "different ranks: files of different saves are mixed"
            )
        found[name] = _cut(shapes, parts)
    return found


def _vector(index: int, name: str, rank: OptimState, length: int, count: int, world: int) -> Part:
    stored = rank.masters[index] if name == "master" else rank.states[index].get(name)
    if stored is None:
        raise FormatError(
            f"{rank.path}: sub-group {index} has no optimizer state {name!r}, other ranks have "
            "it: files of different saves are mixed"
        )
    if stored.numel != length:
        raise FormatError(
            f"{rank.path}: {name} of sub-group {index} has {stored.numel} elements, expected "
            f"{length}: {count} parameters cut over {world} ranks; the file belongs to another "
            "model or world size"
        )
    return Part.of(stored, rank.source)


def _swapped(swapped: Swapped, index: int, name: str, rank: OptimState, length: int) -> Part:
    """A vector of a swapped sub-group: its own file, unless this state stayed in memory."""
    stored = None if name == "master" else rank.states[index].get(name)
    if stored is not None and stored.numel == length:
        return Part.of(stored, rank.source)
    return swapped.part(index, name, rank.dp, length)


def _cut(shapes: Mapping[str, Shape], parts: Sequence[Part]) -> dict[str, LazyTensor]:
    found, at = {}, 0
    vectors = _Vectors(parts)
    for name, shape in shapes.items():
        found[name] = vectors.tensor(shape, at)
        at += per_rank(prod(shape), len(parts))
    return found


class _Vectors:
    """The vectors of all ranks, each with a range of every parameter."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        inside = all(p.inside for p in parts)
        self._length = min(p.size for p in parts) if inside else -1
        self._files: dict[int, tuple[Path, ...]] = {}

    def tensor(self, shape: Shape, offset: int) -> LazyTensor:
        """The parameter whose range starts at ``offset`` of each rank's vector."""
        count, parts = prod(shape), self.parts
        step = per_rank(count, len(parts))

        def runs() -> Iterator[Run]:
            for r, part in enumerate(parts):
                size = min(step, count - r * step)
                if size > 0:
                    yield part.run(offset, offset + size)

        fits = offset + step <= self._length  # then all ranges are there, and they add up
        outline = self._first(-(-count // step) if step else 0) if fits else None
        return finish(from_runs(shape, parts[0].dtype, runs, outline), parts[0].swap)

    def _first(self, count: int) -> tuple[Path, ...]:
        """The files of the first ranks; the same tuple for the same number."""
        if count not in self._files:
            self._files[count] = tuple(p.source.path for p in self.parts[:count])
        return self._files[count]


def read_frozen(models: Sequence[ModelState]) -> dict[str, LazyTensor]:
    """Return the frozen parameters from the fragments in the model files of all ranks.

    Raises:
        FormatError: a fragment is missing or has the wrong length.
        UnsupportedError: fragments quantized by ZeRO++, whose scales DeepSpeed does not save.
    """
    found: dict[str, LazyTensor] = {}
    for name, shape in (models[0].frozen_shapes or {}).items():
        step = per_rank(prod(shape), len(models))
        parts = []
        for m in models:
            stored = (m.frozen or {}).get(name)
            if stored is None:
                raise FormatError(f"{m.path}: no fragment of the frozen parameter {name!r}")
            _check_fragment(m, name, stored, step)
            parts.append(Part.of(stored, m.source))
        found[name] = _Vectors(parts).tensor(shape, 0)
    return found


def _check_fragment(model: ModelState, name: str, stored: StoredTensor, step: int) -> None:
    if stored.dtype == np.int8:
        raise UnsupportedError(
            f"{model.path}: the frozen parameter {name!r} is saved as int8 "
            "(zero_quantized_nontrainable_weights) and DeepSpeed does not save its scales: the "
            "values cannot be restored; take the frozen weights from the base model"
        )
    if stored.numel != step or not stored.contiguous:
        raise FormatError(
            f"{model.path}: the fragment of the frozen parameter {name!r} has {stored.numel} "
            f"elements, expected {step}: the file belongs to another world size"
        )


def check_ranks(ranks: Sequence[OptimState]) -> None:
    """Check the rank that newer files state about themselves (``ds_zero_partition_groups``).

    Raises:
        FormatError: a file says that it is another rank.
    """
    for rank in ranks:
        groups = plain(rank.fields.get("ds_zero_partition_groups"))
        for group in groups if isinstance(groups, list) else []:
            if not isinstance(group, dict) or type(group.get("rank")) is not int:
                continue
            if group.get("partition_count", len(ranks)) != len(ranks):
                raise UnsupportedError(
                    f"{rank.path}: its sub-groups are cut over different numbers of ranks "
                    "(AutoEP with ZeRO-3); convert it with DeepSpeed's ds_to_universal first"
                )
            if group["rank"] != rank.dp:
                raise FormatError(
                    f"{rank.path}: says that it is rank {group['rank']}, its name says {rank.dp}: "
                    "rank files were swapped or renamed"
                )
