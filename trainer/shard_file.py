"""One rank's file of a checkpoint: safetensors whose metadata says where its pieces belong.

The form is that of torch's ``HuggingFaceStorageWriter(save_distributed=True)``
(``torch/distributed/checkpoint/hf_storage.py``), so torch reads it, and ``shardio`` without torch.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ..shardio.dtypes import from_torch
from ..shardio.safetensors_header import build_header
from .pieces import Piece

_SLAB = 1 << 24


def file_name(rank: int, number: int, numbers: int) -> str:
    """Return the name of a rank's file ``number`` (from 1) of ``numbers``."""
    return f"shard-{rank + 1:05d}-model-{number:05d}-of-{numbers:05d}.safetensors"


def write_pieces(path: Path, pieces: Sequence[Piece]) -> tuple[int, int]:
    """Write a file and make it durable.

    Args:
        path: the new file.
        pieces: with data in CPU memory.

    Returns:
        Its size in bytes, and the CRC-32 of its contents.

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
