"""One tensor of a checkpoint in full: where each piece lies, and what its values are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, did_you_mean
from . import dtypes
from .box import extent
from .checkpoint import Checkpoint
from .chunked import Chunked
from .coverage import flaws
from .report import placement_text
from .tensor import LazyTensor
from .tensor_stats import Stats, tensor_stats


@dataclass(frozen=True, slots=True)
class Piece:
    """A file range of a tensor.

    Attributes:
        path: the file.
        offset: its first byte.
        nbytes: from the first byte to the last (more than the piece's own where it is strided).
        start, shape: the box of the tensor that lies there; None where the tensor is computed from
            pieces (dequantized, cast), which then are those of its parts.
        contiguous: whether nothing else lies between the elements.
    """

    path: Path
    offset: int
    nbytes: int
    start: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    contiguous: bool


@dataclass(frozen=True, slots=True)
class TensorDetail:
    """A tensor described.

    Attributes:
        name: as found (an alias is resolved to its owner).
        alias: what was asked for, when it is tied to ``name``.
        shape, dtype, nbytes, placement: as in the report.
        pieces: file ranges, in the tensor's order.
        copies: number of further copies that ranks saved.
        states: optimizer states of the same name.
        stats: values; None when they were not asked for or cannot be read.
        problem: why the tensor is not whole, or None.
    """

    name: str
    alias: str | None
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    placement: str
    pieces: tuple[Piece, ...]
    copies: int
    states: tuple[str, ...]
    stats: Stats | None
    problem: str | None


def tensor_detail(
    ckpt: Checkpoint, name: str, *, progress: Callable[[int, int], None] | None = None
) -> TensorDetail:
    """Describe a weight, a tied alias, or an optimizer state (``exp_avg.<weight>``).

    Args:
        ckpt: an opened checkpoint.
        name: of the tensor.
        progress: called with (bytes done, bytes in all) while the values are read.

    Raises:
        ConfigError: no such tensor; names the closest.
        FormatError: a file is short or unreadable.
    """
    owner = ckpt.tied.get(name, name)
    tensors: dict[str, LazyTensor] = dict(ckpt.weights)
    tensors |= {f"{s}.{n}": t for s, found in ckpt.optimizer.items() for n, t in found.items()}
    if owner not in tensors:
        known = [*ckpt.weights, *ckpt.tied, *tensors]
        raise ConfigError(f"{ckpt.path}: no tensor {name!r}{did_you_mean(name, known)}")
    tensor = tensors[owner]
    problem = next((f.problem for f in flaws({owner: tensor})), None)
    return TensorDetail(
        name=owner,
        alias=name if name != owner else None,
        shape=tensor.shape,
        dtype=dtypes.name(tensor.dtype),
        nbytes=tensor.nbytes,
        placement=placement_text(ckpt, owner, tensor),
        pieces=_pieces(tensor),
        copies=len(ckpt.replicas.get(owner, ())),
        states=tuple(s for s, found in ckpt.optimizer.items() if owner in found),
        stats=None if problem else tensor_stats(tensor, _ticker(2 * tensor.nbytes, progress)),
        problem=problem,
    )


def _ticker(
    total: int, progress: Callable[[int, int], None] | None
) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return tick


def _pieces(tensor: LazyTensor) -> tuple[Piece, ...]:
    if not isinstance(tensor, Chunked):
        return tuple(Piece(path, a, z - a, None, None, True) for path, a, z in tensor.spans())
    itemsize = tensor.dtype.itemsize
    found = []
    for c in sorted(tensor.chunks, key=lambda c: c.lo):
        first, end = c.span(itemsize)
        place = c.source.locate(first)
        path, at = (place[0].path, place[1]) if place else (c.source.path, first)
        shape = extent((c.lo, c.hi))
        found.append(Piece(path, at, end - first, c.lo, shape, c.is_dense(itemsize)))
    return tuple(found)
