"""One rank's part of a distributed torch tensor, as unpickled: which box of the whole it is.

``DTensor`` (FSDP2, tensor parallel) carries its mesh, the rank's coordinate and its placements;
``ShardedTensor`` (FSDP1) carries offsets. Source: ``torch/distributed/tensor/placement_types.py``,
``device_mesh.py`` and ``_shard/sharded_tensor/api.py``, torch 2.1 to 2.13. Fields are looked up by
name because their set differs between versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, product
from math import prod

import numpy as np

from ..errors import FormatError, UnsupportedError
from .box import Index
from .chunked import Chunk, Chunked
from .records import Record, StoredTensor
from .source import FileSource
from .stored import lazy
from .torchfile import read_stored

Intervals = list[tuple[int, int]]
_KINDS = ("DTensor", "ShardedTensor")


def is_sharded(value: object) -> bool:
    """Whether an unpickled value is one rank's part of a tensor."""
    return type(value) is Record and value.name.rpartition(".")[2] in _KINDS


def local_part(value: Record, name: str, source: FileSource) -> Chunked:
    """Return a tensor of the whole shape that has this rank's chunks only.

    Raises:
        FormatError: fields missing or contradicting each other.
        UnsupportedError: pending sums (Partial) or placements unknown to mconv.
    """
    where = f"{source.path}: {name!r}"
    if value.name.endswith("ShardedTensor"):
        return _sharded(value, where, source)
    return _dtensor(value, where, source)


def writer_rank(value: Record) -> int | None:
    """Return the global rank that wrote a part, where the part says so."""
    if value.name.endswith("ShardedTensor"):
        state = value.state
        group = state[2] if type(state) is tuple and len(state) > 2 else None
        rank = group.get("global_rank") if type(group) is Record else None
    else:
        spec = value.get("_spec")
        mesh = spec.get("mesh") if type(spec) is Record else None
        rank = mesh.get("_rank") if type(mesh) is Record else None
    return rank if type(rank) is int else None


# -- ShardedTensor --------------------------------------------------------------------------------


def _sharded(value: Record, where: str, source: FileSource) -> Chunked:
    state = value.state
    if type(state) is not tuple or len(state) < 2 or type(state[1]) is not Record:
        raise FormatError(f"{where}: a ShardedTensor without metadata")
    shape, shards = state[1].get("size"), state[0]
    if not _are_sizes(shape) or type(shards) is not list or len(value.args) < 2:
        raise FormatError(f"{where}: a ShardedTensor without size or shards")
    whole: Index = tuple(shape)  # type: ignore[arg-type]  # checked by _are_sizes
    dtype = value.args[1]
    if not isinstance(dtype, np.dtype):
        raise FormatError(f"{where}: a ShardedTensor without a dtype")
    chunks: list[Chunk] = []
    for shard in shards:
        metadata = shard.get("metadata") if type(shard) is Record else None
        tensor = shard.get("tensor") if type(shard) is Record else None
        lo = metadata.get("shard_offsets") if type(metadata) is Record else None
        if type(tensor) is not StoredTensor or not _are_sizes(lo) or len(lo) != len(whole):  # type: ignore[arg-type]  # a sequence
            raise FormatError(f"{where}: a shard without tensor or offsets")
        start: Index = tuple(lo)  # type: ignore[arg-type]  # checked by _are_sizes
        if tensor.dtype != dtype or len(tensor.shape) != len(whole):
            raise FormatError(f"{where}: a shard is {tensor.dtype} {tensor.shape}, not {dtype}")
        boxes = [[(a, a + n)] for a, n in zip(start, tensor.shape, strict=True)]
        chunks += _place(tensor, boxes, whole, where, source)
    return Chunked(whole, dtype, chunks)


# -- DTensor --------------------------------------------------------------------------------------


def _dtensor(value: Record, where: str, source: FileSource) -> Chunked:
    local, spec = value.get("_local_tensor"), value.get("_spec")
    if type(local) is not StoredTensor or type(spec) is not Record:
        raise FormatError(f"{where}: a DTensor without local tensor or spec")
    shape = next((a for a in value.args if _are_sizes(a)), None)
    meta = spec.get("tensor_meta")
    if type(meta) is Record:
        shape = meta.args[0] if meta.args else meta.get("shape", shape)
    mesh, placements = spec.get("mesh"), spec.get("placements")
    if not _are_sizes(shape) or type(mesh) is not Record or type(placements) is not tuple:
        raise FormatError(f"{where}: a DTensor without shape, mesh or placements")
    whole: Index = tuple(shape)  # type: ignore[arg-type]  # checked by _are_sizes
    sizes, coordinate = _mesh(mesh, where)
    if not len(sizes) == len(coordinate) == len(placements):
        raise FormatError(
            f"{where}: {len(placements)} placements on a mesh of {len(sizes)} dims at {coordinate}"
        )
    kept: list[Intervals] = [[(0, n)] for n in whole]
    cuts = [_cut_of(p, len(whole), where) for p in placements]
    for axis, dim, groups in _steps(cuts, _order(spec, len(placements)), sizes):
        kept[dim] = _take(kept[dim], groups, coordinate[axis], sizes[axis])
    return Chunked(whole, local.dtype, list(_place(local, kept, whole, where, source)))


def _mesh(mesh: Record, where: str) -> tuple[list[int], list[int]]:
    """Return the sizes of the mesh dims and the coordinate of the rank that saved."""
    sizes: list[int] = []
    ranks = mesh.get("mesh")
    layout = mesh.get("_layout")
    if type(ranks) is StoredTensor:
        sizes = list(ranks.shape)
    elif type(layout) is Record:
        sizes = _layout_sizes(layout)
    coordinate = mesh.get("_coordinate_on_dim")
    if _are_sizes(coordinate):
        place = list(coordinate)  # type: ignore[call-overload]  # checked by _are_sizes
    elif type(ranks) is StoredTensor and type(mesh.get("_rank")) is int:
        hits = np.argwhere(read_stored(ranks) == mesh.get("_rank"))
        place = hits[0].tolist() if len(hits) == 1 else []
    else:
        place = []
    if not sizes or any(n < 1 for n in sizes) or len(place) != len(sizes):
        raise FormatError(f"{where}: the device mesh does not say its sizes or the rank's place")
    if any(c >= n for c, n in zip(place, sizes, strict=True)):
        raise FormatError(f"{where}: place {place} lies outside the mesh {sizes}")
    return sizes, place


def _layout_sizes(layout: Record) -> list[int]:
    """Sizes of a _MeshLayout: per-axis records (2.13), or a shape with nested tuples (2.9+)."""
    axes = layout.get("axes")
    if type(axes) is tuple:
        shapes = [a.get("shape", a.args[0] if a.args else None) for a in axes if type(a) is Record]
    else:
        shape = layout.get("shape", layout.args[0] if layout.args else None)
        shapes = list(shape) if type(shape) is tuple else [shape]
    return [_volume(s) for s in shapes]


def _volume(shape: object) -> int:
    if isinstance(shape, (tuple, list)):
        return prod([_volume(s) for s in shape])
    return shape if type(shape) is int else 0


def _order(spec: Record, count: int) -> list[int]:
    """Mesh dims in the order in which they cut: left to right unless the spec has an order."""
    entries = spec.get("shard_order")
    if type(entries) is not tuple or not entries:
        return list(range(count))
    listed: list[int] = []
    for entry in entries:
        parts = entry.args if type(entry) is Record else entry
        axes = parts[1] if type(parts) is tuple and len(parts) == 2 else ()
        if not isinstance(axes, (tuple, list)):
            continue
        listed += [a for a in axes if type(a) is int and 0 <= a < count]
    return listed + [a for a in range(count) if a not in listed]


def _steps(
    cuts: Sequence[tuple[int | None, int]], order: Sequence[int], sizes: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Return (mesh dim, tensor dim, groups) of each cut in the order in which they were made.

    FSDP2 cuts what tensor parallelism has cut already, but its mesh dim comes first. It notes that
    as a strided shard whose factor is the number of cuts to its right; doing those first is the
    same, and right for uneven sizes too.
    """
    placed: list[tuple[float, int, int, int]] = []
    for position, axis in enumerate(order):
        dim, groups = cuts[axis]
        if dim is None:
            continue
        later = [p for p in range(position + 1, len(order)) if cuts[order[p]][0] == dim]
        if groups > 1 and prod(sizes[order[p]] for p in later) == groups:
            placed.append((later[-1] + 0.5, axis, dim, 1))
        else:
            placed.append((position, axis, dim, groups))
    return [(axis, dim, groups) for _, axis, dim, groups in sorted(placed)]


def _cut_of(placement: object, ndim: int, where: str) -> tuple[int | None, int]:
    """Return (dim that is cut, number of strided groups), dim None for a replica."""
    kind = placement.name.rpartition(".")[2] if type(placement) is Record else ""
    fields: Mapping[str, object] = placement.fields if type(placement) is Record else {}
    if kind == "Replicate":
        return None, 1
    if kind not in ("Shard", "_StridedShard"):
        raise UnsupportedError(
            f"{where}: is placed as {kind or placement!r}, which cannot be merged"
            + (" (the ranks' values are still to be summed)" if "Partial" in kind else "")
        )
    dim = fields.get("dim")
    factor = fields.get("split_factor", fields.get("sf", 1))
    if type(dim) is not int or type(factor) is not int or factor < 1 or not -ndim <= dim < ndim:
        raise FormatError(f"{where}: {kind} of dim {dim!r} does not fit {ndim} dims")
    return dim % ndim, factor if kind == "_StridedShard" else 1


def _take(intervals: Intervals, groups: int, coordinate: int, size: int) -> Intervals:
    """Return the piece of one coordinate: of each of ``groups`` chunks the torch.chunk piece."""
    found: Intervals = []
    total = sum(hi - lo for lo, hi in intervals)
    width = -(-total // groups)
    for g in range(groups):
        start, end = min(g * width, total), min((g + 1) * width, total)
        step = -(-(end - start) // size)
        lo = min(start + coordinate * step, end)
        found += _clip(intervals, lo, min(lo + step, end))
    return found


def _clip(intervals: Intervals, start: int, end: int) -> Intervals:
    """Return elements ``start..end`` of the joined intervals."""
    found: Intervals = []
    at = 0
    for lo, hi in intervals:
        a, b = max(start, at), min(end, at + hi - lo)
        if a < b:
            piece = (lo + a - at, lo + b - at)
            if found and found[-1][1] == piece[0]:
                piece = (found.pop()[0], piece[1])
            found.append(piece)
        at += hi - lo
    return found


def _place(
    local: StoredTensor, kept: Sequence[Intervals], whole: Index, where: str, source: FileSource
) -> Iterator[Chunk]:
    """Yield the chunks of a local tensor whose dims are joined intervals of the whole."""
    expected = tuple(sum(hi - lo for lo, hi in intervals) for intervals in kept)
    if local.shape != expected and not (0 in local.shape and 0 in expected):
        raise FormatError(f"{where}: the rank holds {local.shape}, its placements say {expected}")
    tensor = lazy(local, source)
    if not isinstance(tensor, Chunked):
        raise UnsupportedError(f"{where}: rank files written on big-endian machines")
    starts = [[0, *accumulate(hi - lo for lo, hi in intervals)] for intervals in kept]
    for pick in product(*(range(len(i)) for i in kept)):
        lo = tuple(kept[d][k][0] for d, k in enumerate(pick))
        hi = tuple(kept[d][k][1] for d, k in enumerate(pick))
        if any(h > n for h, n in zip(hi, whole, strict=True)):
            raise FormatError(f"{where}: a shard ends at {hi}, outside the shape {whole}")
        at = [starts[d][k] for d, k in enumerate(pick)]
        box = [slice(a, a + h - l) for a, l, h in zip(at, lo, hi, strict=True)]
        for chunk in tensor.slice(box).chunks:
            yield chunk.moved(lo)


def _are_sizes(values: object) -> bool:
    if type(values) not in (tuple, list):
        return False
    return all(type(n) is int and 0 <= n < 2**63 for n in values)  # type: ignore[attr-defined]  # a sequence
