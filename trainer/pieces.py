"""The pieces of a run's tensors: which rank writes which region of which Hugging Face tensor.

A rank holds regions of whole tensors, some of them held by others too. Every region is written
once, by the rank that has least to write among those that hold it. Stacks of experts are written
as the experts that they hold, so that files have Hugging Face's tensors and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .init import local_region
from .model_config import ModelConfig
from .moe import expert_names

Place = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, offsets, sizes


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of a tensor.

    Attributes:
        name: of the whole tensor.
        offsets: where the region begins.
        data: its elements.
    """

    name: str
    offsets: tuple[int, ...]
    data: Tensor

    @property
    def place(self) -> Place:
        """What tells the piece from others."""
        return self.name, self.offsets, tuple(self.data.shape)


def pieces_of(name: str, tensor: Tensor, config: ModelConfig) -> list[Piece]:
    """Return this rank's pieces of a parameter, or of a tensor shaped and cut like it.

    Args:
        name: of the parameter.
        tensor: cut (``DTensor``) or whole.
        config: of the model.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    starts = tuple(region.start for region in local_region(tensor))
    if not local.numel():
        return []
    experts = expert_names(config, name)
    if experts is None:
        return [Piece(name, starts, local.detach())]
    first = starts[0]
    return [
        Piece(experts[first + n], starts[1:], one.detach()) for n, one in enumerate(local.unbind())
    ]


def mine(pieces: Iterable[Piece], rank: int, world_size: int) -> list[Piece]:
    """Return those of this rank's pieces that it shall write; every rank calls this."""
    held = list(pieces)
    places: list[list[Place]] = [[] for _ in range(world_size)]
    if world_size > 1:
        dist.all_gather_object(places, [p.place for p in held])
    else:
        places = [[p.place for p in held]]
    owners = assign(places)
    return [p for p in held if owners[p.place] == rank]


def assign(places: list[list[Place]]) -> dict[Place, int]:
    """Return who writes each place, given what every rank holds; the same on all ranks.

    Places with one holder come first; the others go, largest first, to their holder with the least
    elements so far.
    """
    holders: dict[Place, list[int]] = {}
    for rank, held in enumerate(places):
        for place in held:
            holders.setdefault(place, []).append(rank)
    loads = [0] * len(places)
    owners: dict[Place, int] = {}
    for place in sorted(holders, key=lambda p: (len(holders[p]) > 1, -prod(p[2]), p)):
        owner = min(holders[place], key=lambda rank: (loads[rank], rank))
        owners[place] = owner
        loads[owner] += prod(place[2])
    return owners


def whole_names(names: Iterable[str], config: ModelConfig) -> Mapping[str, list[str]]:
    """Return the Hugging Face tensors that each parameter is made of: itself, or its experts."""
    return {name: expert_names(config, name) or [name] for name in names}
