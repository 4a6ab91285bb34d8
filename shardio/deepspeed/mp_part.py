"""What one model-parallel rank of DeepSpeed trains: some tensors, each cut by tensor parallelism.

A ``Source`` of the whole model becomes one of a rank, which the writers then treat as a model of
its own. Ranks are numbered stage * tp + tensor rank (``runtime/pipe/topology.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint import Tensors
from ..placement import Placement
from ..tensor import LazyTensor
from ..training_state import Group
from .state_files import Source


@dataclass(frozen=True, slots=True)
class Cut:
    """How every tensor is cut over tensor-parallel ranks.

    Attributes:
        placements: by weight; none for those that are whole on every rank.
        tp: ranks.
    """

    placements: Mapping[str, Placement]
    tp: int = 1

    def of(self, name: str, tensor: LazyTensor, rank: int) -> LazyTensor:
        """A rank's part of a weight, or of a state of its shape."""
        placement = self.placements.get(name)
        return tensor if placement is None or self.tp == 1 else placement.cut(tensor, rank, self.tp)


def part_of(
    source: Source, cut: Cut, *, stage: int = 0, pp: int = 1, rank: int = 0,
    names: Sequence[str] | None = None,
) -> Source:  # fmt: skip
    """Return what a rank trains.

    Args:
        source: of the whole model.
        cut: how tensors are cut.
        stage: pipeline stage.
        pp: pipeline stages.
        rank: tensor-parallel rank.
        names: the tensors of the stage in the order of its optimizer (None: all as they are).
    """
    ckpt, training = source.ckpt, source.training
    order = list(ckpt.weights) if names is None else list(names)
    kept = set(order)

    def parts(tensors: Tensors) -> dict[str, LazyTensor]:
        """The rank's share of a state."""
        return {n: cut.of(n, tensors[n], rank) for n in order if n in tensors}

    groups = [Group(_within(order, g.names), g.settings) for g in training.groups]
    return replace(
        source,
        ckpt=replace(
            ckpt,
            weights=parts(ckpt.weights),
            tied={a: o for a, o in ckpt.tied.items() if o in kept} if names is None else {},
        ),
        training=replace(
            training,
            groups=tuple(g for g in groups if g.names),
            states={s: parts(t) for s, t in training.states.items()},
            masters=parts(training.masters),
            frozen=_within(order, training.frozen),
            buffers=_within(order, training.buffers),
        ),
        mp=stage * cut.tp + rank,
        pp=pp,
        tp=cut.tp,
    )


def _within(order: Sequence[str], names: Collection[str]) -> tuple[str, ...]:
    """Those of the names that are in an order, in that order."""
    wanted = set(names)
    return tuple(n for n in order if n in wanted)
