"""The ``affine_map`` of DeepSpeed 0.19.8 and later: which box of the whole tensor each rank holds.

A piece is an as_strided view on both sides: shape, offset and strides in the whole tensor
("source") and in the rank's shard ("dest"). The pieces AutoTP writes are plain boxes; views that
transpose or scale are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ...errors import FormatError, LayoutError, UnsupportedError
from ..box import Box, Index, row_major
from ..chunked import Chunked
from ..placement import Placement, Replicate, Shard, shard_range
from ..tensor import LazyTensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the whole tensor and the box of the shard that holds it."""

    whole: Box
    shard: Box


@dataclass(frozen=True, slots=True)
class Affine(Placement):
    """Boxes per rank.

    Attributes:
        shape: of the whole tensor.
        shards: shape of each rank's shard.
        ranks: the pieces of each rank.
    """

    shape: Index
    shards: tuple[Index, ...]
    ranks: tuple[tuple[Piece, ...], ...]

    def simple(self) -> Placement | None:
        """The same as a standard placement, where it is one."""
        full: Box = ((0,) * len(self.shape), self.shape)
        boxes = [p[0].whole if len(p) == 1 else None for p in self.ranks]
        if all(b == full for b in boxes):
            return Replicate()
        for dim, size in enumerate(self.shape):
            ends = [shard_range(size, r, len(boxes)) for r in range(len(boxes))]
            cuts = [
                (
                    tuple(lo if k == dim else 0 for k in range(len(self.shape))),
                    tuple(hi if k == dim else n for k, n in enumerate(self.shape)),
                )
                for lo, hi in ends
            ]
            if boxes == cuts:
                return Shard(dim)
        return None

    def cut(self, tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
        """The rank's shard."""
        return _place(
            self.shards[rank], [(p.shard[0], _slice(tensor, p.whole)) for p in self.ranks[rank]]
        )

    def assemble(self, parts: Sequence[LazyTensor], shape: Index | None = None) -> LazyTensor:
        """The boxes of all ranks; of boxes that several ranks hold, the first copy."""
        if len(parts) != len(self.ranks):
            raise LayoutError(f"the affine map has {len(self.ranks)} ranks, not {len(parts)}")
        boxes: dict[Box, LazyTensor] = {}
        for part, want, pieces in zip(parts, self.shards, self.ranks, strict=True):
            if part.shape != want:
                raise LayoutError(f"a shard has shape {part.shape}, the affine map says {want}")
            for p in pieces:
                boxes.setdefault(p.whole, _slice(part, p.shard))
        return _place(self.shape, [(box[0], t) for box, t in boxes.items()])

    def __str__(self) -> str:
        return "Affine"


def _slice(tensor: LazyTensor, box: Box) -> LazyTensor:
    return tensor.slice(tuple(slice(a, b) for a, b in zip(*box, strict=True)))


def _place(shape: Index, pieces: Sequence[tuple[Index, LazyTensor]]) -> LazyTensor:
    chunks = []
    for lo, tensor in pieces:
        if not isinstance(tensor, Chunked):
            raise UnsupportedError("an affine map over big-endian or computed tensors")
        chunks += [c.moved(lo) for c in tensor.chunks]
    return Chunked(shape, pieces[0][1].dtype, chunks)


def read_affine(value: object, source: str) -> dict[str, Affine]:
    """Read an ``affine_map`` (as plain data) by parameter pattern.

    Raises:
        FormatError: malformed maps.
        UnsupportedError: versions, scales and strides other than AutoTP's.
    """
    if value is None:
        return {}
    try:
        if value["version"] != 1:  # type: ignore[index]  # plain data of unknown form
            raise UnsupportedError(f"{source}: affine_map version {value['version']!r}")  # type: ignore[index]
        entries = value["params"].items()  # type: ignore[index]
        return {str(pattern): _entry(entry, f"{source}: {pattern}") for pattern, entry in entries}
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
        raise FormatError(f"{source}: malformed affine_map ({type(e).__name__}: {e})") from None


def _entry(entry: Any, source: str) -> Affine:
    shape = tuple(entry["logical_shape"])
    ranks = [entry["ranks"][str(r)] for r in range(len(entry["ranks"]))]
    shards = [tuple(r["shard_shape"]) for r in ranks]
    return Affine(
        shape,
        tuple(shards),
        tuple(
            tuple(_piece(p, shape, shard, source) for p in r["pieces"])
            for r, shard in zip(ranks, shards, strict=True)
        ),
    )


def _piece(piece: Any, whole: Index, shard: Index, source: str) -> Piece:
    if piece.get("scale") is not None:
        raise UnsupportedError(f"{source} is scaled in the affine_map")
    size = tuple(piece["shape"])
    return Piece(
        _box(size, piece["source"], whole, source), _box(size, piece["dest"], shard, source)
    )


def _box(size: Index, view: Any, shape: Index, source: str) -> Box:
    """Return the box of ``shape`` that a strided view covers."""
    offset, strides = view
    natural = row_major(shape)
    plain = (
        0 not in shape
        and len(size) == len(shape)
        and all(n == 1 or a == b for n, a, b in zip(size, strides, natural, strict=True))
    )
    if not plain or type(offset) is not int or not 0 <= offset < max(1, prod(shape)):
        raise UnsupportedError(f"{source} is cut in a way that is no box")
    lo = tuple(offset // step % n for step, n in zip(natural, shape, strict=True))
    hi = tuple(a + n for a, n in zip(lo, size, strict=True))
    if any(b > n for b, n in zip(hi, shape, strict=True)):
        raise FormatError(f"{source}: the affine_map leaves the tensor")
    return lo, hi
