"""What each rank writes of a checkpoint: pieces of tensors, and the file that holds them.

A rank holds regions of whole tensors, some of them held by others too. Every region is written
once, by the rank that has least to write among those that hold it. Stacks of experts are written
as the experts that they hold, so that files have Hugging Face's tensors and nothing else.

A file is safetensors whose metadata says where its pieces belong, as torch's
``HuggingFaceStorageWriter(save_distributed=True)`` writes it (its ``checkpoint/hf_storage.py``), so
torch reads it, and ``shardio`` without torch.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..shardio.dtypes import from_torch
from ..shardio.safetensors_header import build_header
from .init import local_part, local_region
from .moe import expert_names
from .settings.model import ModelConfig

Place = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, offsets, sizes

_SLAB = 1 << 24


@dataclass(frozen=True, slots=True)
class Piece:
    """The elements of a tensor's region that begins at ``offsets``."""

    name: str
    offsets: tuple[int, ...]
    data: Tensor

    @property
    def place(self) -> Place:
        """What tells the piece from others."""
        return self.name, self.offsets, tuple(self.data.shape)


def pieces_of(name: str, tensor: Tensor, config: ModelConfig) -> list[Piece]:
    """Return this rank's pieces of a parameter, or of a tensor named, shaped and cut like it."""
    local = local_part(tensor).detach()
    starts = tuple(region.start for region in local_region(tensor))
    if not local.numel():
        return []
    experts = expert_names(config, name)
    if experts is None:
        return [Piece(name, starts, local)]
    return [Piece(experts[starts[0] + n], starts[1:], one) for n, one in enumerate(local.unbind())]


def mine(pieces: Sequence[Piece]) -> list[Piece]:
    """Return those of this rank's pieces that it shall write; every rank calls this."""
    places: list[list[Place]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(places, [p.place for p in pieces])
    owners = assign(places)
    return [p for p in pieces if owners[p.place] == dist.get_rank()]


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
        owners[place] = min(holders[place], key=lambda rank: (loads[rank], rank))
        loads[owners[place]] += prod(place[2])
    return owners


def file_name(rank: int, number: int, numbers: int) -> str:
    """Return the name of a rank's file ``number`` (from 1) of ``numbers``."""
    return f"shard-{rank + 1:05d}-model-{number:05d}-of-{numbers:05d}.safetensors"


def write_pieces(path: Path, pieces: Sequence[Piece]) -> tuple[int, int]:
    """Write a durable file of pieces in CPU memory; return its bytes and their CRC-32.

    Raises:
        OSError: it cannot be written.
    """
    ordered = sorted(pieces, key=lambda p: (-p.data.element_size(), p.name))
    places = {p.name: {"saved_offsets": list(p.offsets)} for p in ordered}
    metadata = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": json.dumps(places),
    }
    entries = [(p.name, from_torch(str(p.data.dtype)), tuple(p.data.shape)) for p in ordered]
    header, _ = build_header(entries, metadata)
    crc, size = zlib.crc32(header), len(header)
    with path.open("wb", buffering=0) as file:
        file.write(header)
        for piece in ordered:
            flat = piece.data.contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, flat.numel(), _SLAB):
                slab = flat[start : start + _SLAB].numpy().data
                file.write(slab)
                crc, size = zlib.crc32(slab, crc), size + len(slab)
        os.fsync(file.fileno())
    return size, crc
