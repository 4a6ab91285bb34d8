"""``mconv.diff``: two checkpoints of any formats, compared tensor by tensor without holding them.

Dtypes may differ. A value that one side rounded differs then, unless both are rounded alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..shardio import Checkpoint, dtypes, open_checkpoint
from ..shardio.checkpoint import Tensors
from ..shardio.compare import Difference, compare, in_parallel
from ..shardio.coverage import prove
from ..shardio.tensor import LazyTensor
from .naming import to_hf
from .prepare import vocab_size_of


@dataclass(frozen=True, slots=True)
class DiffReport:
    """How two checkpoints differ.

    Attributes:
        only_left, only_right: names on one side only.
        reshaped: name to (left shape, right shape) where they differ.
        tensors: the comparison of every common tensor.
        notes: what explains differences.
    """

    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    tensors: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors with the same values."""
        names = self.only_left or self.only_right or self.reshaped
        return not names and all(d.equal for d in self.tensors)

    def within(self, tolerance: float) -> bool:
        """Whether names and shapes agree and no relative difference exceeds ``tolerance``."""
        names = self.only_left or self.only_right or self.reshaped
        return not names and all(d.max_rel <= tolerance for d in self.tensors)


def diff(
    left: Checkpoint | str | Path,
    right: Checkpoint | str | Path,
    *,
    with_optimizer: bool = False,
    vocab_size: int | None = None,
    rounded: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DiffReport:
    """Compare two checkpoints in HF names.

    Args:
        left, right: opened checkpoints or paths.
        with_optimizer: compare the optimizer states too (as ``<state>.<name>``).
        vocab_size: true vocabulary size, where one side is padded.
        rounded: compare tensors of two dtypes in the one with fewer bytes.
        progress: called with (bytes done, bytes in all).

    Raises:
        MconvError: a side cannot be opened, is not whole, or cannot be brought into HF names.
    """
    sides = [s if isinstance(s, Checkpoint) else open_checkpoint(s) for s in (left, right)]
    known = (vocab_size, *(vocab_size_of(s) for s in sides))
    size = next((n for n in known if n is not None), None)
    a, b = (_flat(side, with_optimizer, size) for side in sides)
    common = [n for n in a if n in b]
    reshaped = {n: (a[n].shape, b[n].shape) for n in common if a[n].shape != b[n].shape}
    same_shape = [n for n in common if n not in reshaped]
    if rounded:
        for n in same_shape:
            a[n], b[n] = _narrowed(a[n], b[n])
    total = sum(a[n].nbytes for n in same_shape)
    done, found = 0, []
    for d in in_parallel(lambda n: compare(n, a[n], b[n]), same_shape):
        found.append(d)
        done += a[d.name].nbytes
        if progress:
            progress(done, total)
    return DiffReport(
        tuple(n for n in a if n not in b),
        tuple(n for n in b if n not in a),
        reshaped,
        tuple(found),
        tuple(_notes([d.name for d in found if not d.equal], sides, a, b)),
    )


def _narrowed(a: LazyTensor, b: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    if a.dtype.itemsize < b.dtype.itemsize:
        return a, b.cast(a.dtype)
    return (a.cast(b.dtype), b) if b.dtype.itemsize < a.dtype.itemsize else (a, b)


def _notes(
    names: Sequence[str], sides: Sequence[Checkpoint], a: Tensors, b: Tensors
) -> Iterator[str]:
    """Say which differing tensors have two dtypes, and which side's are fp32 masters."""
    pairs = Counter((dtypes.name(a[n].dtype), dtypes.name(b[n].dtype)) for n in names)
    origin = [" (its fp32 masters)" if _are_masters(side) else "" for side in sides]
    for (left, right), count in pairs.items():
        if left != right:
            yield (
                f"{count} of the tensors that differ are {left}{origin[0]} on the left and "
                f"{right}{origin[1]} on the right: where rounding is the only difference, they are "
                "equal with --rounded"
            )


def _are_masters(ckpt: Checkpoint) -> bool:
    """Whether the weights are read from the optimizer's masters, as under ZeRO stage 3."""
    masters = ckpt.optimizer.get("master", {})
    return any(masters.get(name) is tensor for name, tensor in ckpt.weights.items())


def _flat(ckpt: Checkpoint, with_optimizer: bool, vocab_size: int | None) -> dict[str, LazyTensor]:
    prove(ckpt.weights, ckpt.path)
    hf = to_hf(ckpt, vocab_size=vocab_size)
    tensors = dict(hf.weights)
    for alias, owner in hf.tied.items():
        if owner in tensors:
            tensors.setdefault(alias, tensors[owner])
    if with_optimizer:
        for state, states in hf.optimizer.items():
            tensors |= {f"{state}.{name}": t for name, t in states.items()}
    return tensors
