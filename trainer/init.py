"""Memory and initial weights, independent of the parallel layout.

Every parameter has a generator of its own, seeded by its name and the run's seed; a rank draws the
whole tensor and keeps its part. (Drawing into a ``DTensor`` shard directly would give every rank
the same numbers on CPU, and other numbers for every layout.)
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from .model import Decoder

_DEVIATION = 0.02


def materialize(model: Decoder, seed: int) -> None:
    """Allocate a model built on the meta device (sharded or not) and fill it, in place.

    Norms (vectors) become ones, matrices N(0, 0.02²). A tied head is tied again: moving a model off
    the meta device parts shared parameters.

    Args:
        model: on the meta device.
        seed: of the run.
    """
    model.to_empty(device="cpu")
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            full = torch.empty(parameter.shape, dtype=parameter.dtype)
            full.normal_(0.0, _DEVIATION, generator=_generator(name, seed))
            parameter.copy_(_part(full, parameter))


def _part(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return full
    # without a source rank every rank slices its own copy and nothing is sent
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
