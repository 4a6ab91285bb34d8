"""One file of a FairScale FSDP save, and one model part put together from all of its shards.

Every flat vector is cut into equal ranges; each rank's file says how much of its own range is
padding. Names in the metadata are relative to the FSDP module (``fsdp_path``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import FormatError, LayoutError
from .flat_buffer import FlatBuffer, Part
from .names import strip_wrappers
from .records import StoredTensor
from .source import FileSource
from .stored import lazy, plain
from .tensor import LazyTensor
from .torchfile import open_torch_file

_RANK = re.compile(r"(?:-model_part-\d+)?-shard\d+$")
_OPTIMIZERS = ("optimizer", "last_optimizer_state", "optimizer_state", "optimizer_state_dict")
_CONTAINERS = ("model", "state_dict")
_SETTINGS = ("cfg", "args", "extra_state", "task_state")


@dataclass(frozen=True, slots=True)
class Vector:
    """One flat parameter as a rank describes it.

    Attributes:
        key: its name in the file.
        path: of the FSDP module.
        names, shapes: of the parameters inside, in order.
        padding: elements at the end of this rank's range that belong to none.
    """

    key: str
    path: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    padding: int


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file.

    Attributes:
        path: the file.
        tensors: by name, wrapper prefixes stripped.
        vectors: the flat ones among them.
        shared: (alias, owner) pairs.
        states: optimizer states of the vectors, in their order, or empty.
        step, groups, settings: plain data.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    vectors: tuple[Vector, ...]
    shared: tuple[tuple[str, str], ...]
    states: tuple[Mapping[str, StoredTensor], ...]
    step: int | None
    groups: Any
    settings: Mapping[str, Any]


def read_shard(path: Path) -> ShardFile:
    """Read one file.

    Raises:
        FormatError: not such a file, or metadata of another shape.
    """
    file = open_torch_file(path)
    _check_place(path, file.archive)
    root = file.root
    table = root if isinstance(root, dict) else {}
    model = next((table[k] for k in _CONTAINERS if k in table), None)
    if not isinstance(model, dict):
        raise FormatError(f"{path}: expected a dict with 'model' and 'shard_metadata'")
    metadata = table.get("shard_metadata")
    entries = metadata.get("param_metadata") if isinstance(metadata, dict) else None
    if not isinstance(entries, list):
        raise FormatError(
            f"{path}: has no shard_metadata: the names and shapes inside its flat vectors are in "
            "no file; save again with a metaseq or fairscale that writes it"
        )
    tensors = {strip_wrappers(str(k)): v for k, v in model.items() if isinstance(v, StoredTensor)}
    vectors, shared = [], []
    for entry in entries:
        try:
            vectors += list(_vectors(entry))
            shared += [
                (_under(entry["fsdp_path"], alias), _under(entry["fsdp_path"], owner))
                for owner, alias in entry.get("shared_param_info", ())
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise FormatError(f"{path}: shard_metadata is malformed ({e})") from e
    states, step, groups = _optimizer(table)
    settings = {k: plain(table[k]) for k in _SETTINGS if k in table}
    return ShardFile(path, tensors, tuple(vectors), tuple(shared), states, step, groups, settings)


def _check_place(path: Path, archive: str) -> None:
    """Refuse a file that was saved as another rank's (torch keeps the name in the archive)."""
    saved, now = _RANK.search(archive), _RANK.search(path.stem)
    if saved and now and saved[0] != now[0]:
        raise FormatError(f"{path}: was saved as {archive}.pt: files were swapped or renamed")


def _under(path: str, name: str) -> str:
    return strip_wrappers(f"{path}.{name}" if path else name)


def _vectors(entry: Mapping[str, Any]) -> Iterator[Vector]:
    path = str(entry["fsdp_path"])
    for key, info in entry["params"].items():
        shapes = tuple(tuple(int(n) for n in s) for s in info["shapes"])
        numels = [int(n) for n in info["numels"]]
        if numels != [prod(s) for s in shapes] or len(info["names"]) != len(shapes):
            raise ValueError(f"sizes of {key} in {path!r} contradict its shapes")
        padding = int(info["padding"])
        if padding < 0:
            raise ValueError(f"padding {padding}")
        names = tuple(_under(path, n) for n in info["names"])
        yield Vector(_under(path, key), path, names, shapes, padding)


def _optimizer(
    root: Mapping[object, Any],
) -> tuple[tuple[Mapping[str, StoredTensor], ...], int | None, Any]:
    found = next((root[k] for k in _OPTIMIZERS if isinstance(root.get(k), dict)), None)
    state = found.get("state") if found is not None else None
    if found is None or not isinstance(state, dict):
        return (), None, None
    ordered = [
        state[k] for k in sorted(state, key=lambda k: (not isinstance(k, int), str(k).zfill(9)))
    ]
    states = tuple(
        {k: v for k, v in s.items() if isinstance(v, StoredTensor) and v.shape}
        for s in ordered
        if isinstance(s, dict)
    )
    step = plain(ordered[0].get("step")) if ordered and isinstance(ordered[0], dict) else None
    groups = [
        {k: v for k, v in g.items() if k != "params"}
        for g in plain(found.get("param_groups")) or []
        if isinstance(g, dict)
    ]
    return states, int(step) if isinstance(step, int | float) else None, groups


@dataclass(frozen=True, slots=True)
class ModelPart:
    """The tensors of one tensor-parallel part.

    Attributes:
        weights: by name.
        optimizer: state to tensors by weight name.
        tied: alias to owner.
        notes: what a user should know.
    """

    weights: Mapping[str, LazyTensor]
    optimizer: Mapping[str, Mapping[str, LazyTensor]]
    tied: Mapping[str, str]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, shards: Sequence[ShardFile], root: Path) -> ModelPart:
        """Join shards in rank order.

        Raises:
            FormatError: files of different saves.
            LayoutError: ranges that do not add up (a shard is missing or in the wrong place).
        """
        _check_alike(shards)
        sources = [FileSource.of(s.path) for s in shards]
        weights: dict[str, LazyTensor] = {}
        states: dict[str, dict[str, LazyTensor]] = {}
        notes: list[str] = []
        with_states = len(shards[0].states) == len(shards[0].vectors)
        if shards[0].states and not with_states:
            notes.append(
                f"the optimizer has {len(shards[0].states)} states for {len(shards[0].vectors)} "
                "flat vectors and is left out"
            )
        for k, vector in enumerate(shards[0].vectors):
            held = [s.tensors[vector.key] for s in shards]
            weights |= _unflatten(root, vector, _buffer(shards, sources, k, held))
            for state in shards[0].states[k] if with_states else ():
                moments = [s.states[k][state] for s in shards]
                whole = _buffer(shards, sources, k, moments)
                states.setdefault(state, {}).update(_unflatten(root, vector, whole))
        flat = {v.key for v in shards[0].vectors}
        weights |= {n: lazy(t) for n, t in shards[0].tensors.items() if n not in flat}
        return cls(weights, states, dict(shards[0].shared), tuple(notes))


def _check_alike(shards: Sequence[ShardFile]) -> None:
    first = shards[0]
    for shard in shards:
        missing = [v.key for v in shard.vectors if v.key not in shard.tensors]
        if missing:
            raise FormatError(f"{shard.path}: describes {missing[0]}, but does not hold it")
        here = [(v.key, v.names, v.shapes) for v in shard.vectors]
        if here != [(v.key, v.names, v.shapes) for v in first.vectors]:
            raise FormatError(f"{shard.path} and {first.path.name} describe different models")
        if [set(s) for s in shard.states] != [set(s) for s in first.states]:
            raise FormatError(f"{shard.path} and {first.path.name} hold different optimizers")


def _buffer(
    shards: Sequence[ShardFile],
    sources: Sequence[FileSource],
    k: int,
    held: Sequence[StoredTensor],
) -> FlatBuffer:
    """Join the ranges of one vector, each without its own padding."""
    parts = []
    for shard, source, tensor in zip(shards, sources, held, strict=True):
        padding = shard.vectors[k].padding
        part = Part.of(tensor, source)
        if len(tensor.shape) != 1 or padding > part.size or tensor.dtype != held[0].dtype:
            raise LayoutError(
                f"{shard.path}: {shard.vectors[k].key} is {tensor.dtype} {list(tensor.shape)} with "
                f"{padding} elements of padding: it does not fit the other shards"
            )
        parts.append(Part(source, part.offset, part.size - padding, part.dtype, part.swap))
    return FlatBuffer.of(parts)


def _unflatten(root: Path, vector: Vector, whole: FlatBuffer) -> dict[str, LazyTensor]:
    need = sum(prod(s) for s in vector.shapes)
    have = whole.ends[-1]
    if have != need:
        raise LayoutError(
            f"{root}: the shards of {vector.key} hold {have} elements, its parameters need {need}: "
            "shard files are missing or belong to another save"
        )
    found: dict[str, LazyTensor] = {}
    at = 0
    for name, shape in zip(vector.names, vector.shapes, strict=True):
        found[name] = whole.tensor(at, shape)
        at += prod(shape)
    return found
