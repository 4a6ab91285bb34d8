"""Where the parts of nanotron's tensors belong: slice pairs (local to global) from file metadata.

``0,32,None|None,None,None#64,96,None|None,None,None``: rows 0 to 32 of the part are rows 64 to 96
of the tensor, all columns; pairs are separated by ``;``. Shapes are written as Python tuples, with
``np.int64(128)`` under numpy 2. Source: nanotron ``serialize/metadata.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError, LayoutError
from .box import Index, extent
from .chunked import Chunk, Chunked
from .tensor import LazyTensor

Slices = tuple[tuple[int, int], ...]  # (start, stop) per dim
Pair = tuple[Slices, Slices]  # local, global
_NUMPY = re.compile(r"np\.int\d+\((\d+)\)")
_SHAPE = re.compile(r"^[(\[]?\s*((?:\d+\s*,?\s*)*)[)\]]?$")


@dataclass(frozen=True, slots=True)
class Piece:
    """One file's part of a tensor.

    Attributes:
        path: the file.
        tensor: what it holds.
        shape: of the whole tensor.
        pairs: where its slices belong.
        pp, pps, tp, tps: the rank that wrote it and the sizes, ``pps`` 0 for unsharded tensors.
    """

    path: Path
    tensor: Chunked
    shape: Index
    pairs: tuple[Pair, ...]
    pp: int = 0
    pps: int = 0
    tp: int = 0
    tps: int = 1

    @property
    def sharded(self) -> bool:
        """Whether the file name says a rank."""
        return self.pps > 0


def whole(path: Path, tensor: Chunked) -> Piece:
    """Return the only piece of a tensor that is in one file."""
    box = tuple((0, n) for n in tensor.shape)
    return Piece(path, tensor, tensor.shape, ((box, box),))


def parse_shape(path: Path, text: str) -> Index:
    """Parse ``(128, 64)`` or ``(np.int64(128), 64)``. Raises FormatError for anything else."""
    match = _SHAPE.match(_NUMPY.sub(r"\1", text))
    if not text or match is None:
        raise FormatError(f"{path}: unsharded_shape is {text[:80]!r}, expected a tuple of sizes")
    return tuple(int(n) for n in re.findall(r"\d+", match[1]))


def parse_pairs(path: Path, text: str, local: Index) -> tuple[Pair, ...]:
    """Parse ``local_global_slices_pairs``; open ends of local slices are those of the part.

    Open ends of global slices are -1: the whole dim.

    Raises:
        FormatError: malformed text, steps, slices outside the part.
    """
    pairs = []
    for item in text.split(";"):
        left, mark, right = item.partition("#")
        inner, outer = _slices(path, left), _slices(path, right)
        if not mark or len(inner) != len(local) or len(outer) != len(local):
            raise FormatError(f"{path}: slices {item[:80]!r} do not fit a {len(local)}-d part")
        closed = tuple((a, n if b < 0 else b) for (a, b), n in zip(inner, local, strict=True))
        if any(not 0 <= a <= b <= n for (a, b), n in zip(closed, local, strict=True)):
            raise FormatError(f"{path}: slices {item[:80]!r} reach outside the part {local}")
        pairs.append((closed, outer))
    return tuple(pairs)


def _slices(path: Path, text: str) -> Slices:
    found = []
    for item in text.split("|"):
        words = item.split(",")
        if len(words) != 3 or words[2] not in ("None", "1"):
            raise FormatError(f"{path}: {item[:80]!r} is no slice start,stop,step with step 1")
        start, stop = words[:2]
        if not (start == "None" or start.isdigit()) or not (stop == "None" or stop.isdigit()):
            raise FormatError(f"{path}: {item[:80]!r} is no slice with non-negative ends")
        found.append((0 if start == "None" else int(start), -1 if stop == "None" else int(stop)))
    return tuple(found)


def assemble(
    root: Path,
    name: str,
    pieces: Sequence[Piece],
    parts: Sequence[LazyTensor] | None = None,
) -> LazyTensor:
    """Return the whole tensor.

    Args:
        root: for messages.
        name: the tensor.
        pieces: all of them.
        parts: other tensors in the place of the pieces' own (optimizer states).

    Raises:
        LayoutError: a part that does not fit its place.
    """
    shape = pieces[0].shape
    chunks: list[Chunk] = []
    given = [p.tensor for p in pieces] if parts is None else parts
    for piece, part in zip(pieces, given, strict=True):
        if part.shape != piece.tensor.shape or not isinstance(part, Chunked):
            raise LayoutError(f"{root}: {name}: part {part.shape} is not like {piece.path}")
        for inner, outer in piece.pairs:
            place = tuple((a, n if b < 0 else b) for (a, b), n in zip(outer, shape, strict=True))
            cut = part.slice([slice(a, b) for a, b in inner])
            lo, hi = tuple(a for a, _ in place), tuple(b for _, b in place)
            if extent((lo, hi)) != cut.shape or any(b > n for b, n in zip(hi, shape, strict=True)):
                raise LayoutError(f"{piece.path}: {cut.shape} does not fit {place} of {shape}")
            chunks += [c.moved(lo) for c in cut.chunks]
    return Chunked(shape, given[0].dtype, chunks)
