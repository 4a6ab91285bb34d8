"""Memory and initial weights, independent of the parallel layout.

Every parameter has a generator of its own, seeded by its name and the run's seed; a rank draws the
whole tensor in float32 and keeps its region. (Drawing into a ``DTensor`` shard directly would give
every rank the same numbers on CPU, and other numbers for every layout.)
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .lora.linear import Factor
from .model import Decoder
from .norm import RMSNorm

_DEVIATION = 0.02
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def materialize(part: Decoder, seed: int, device: torch.device | str = "cpu") -> None:
    """Allocate a model part built on the meta device (cut or not) and fill it, in place.

    Norms are the identity, biases zero, all others N(0, 0.02²). A tied head is tied again: leaving
    the meta device parts shared parameters.

    Args:
        part: on the meta device.
        seed: of the run.
        device: where its parameters lie.
    """
    part.to_empty(device=device)
    part.tie()
    with torch.no_grad():
        for module_name, module in part.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{module_name}.{leaf}" if module_name else leaf
                fill(parameter, _values(module, leaf, source_name(part, name), seed))


def source_name(part: Decoder, name: str) -> str:
    """Return the parameter whose values ``name`` has: a tied head's are the embedding's."""
    return EMBEDDING if name == HEAD and part.config.tie_word_embeddings else name


def fill(parameter: Tensor, values: Callable[[tuple[int, ...]], Tensor]) -> None:
    """Fill this rank's part of a parameter from ``values(global shape)``, in place."""
    local_part(parameter).copy_(values(tuple(parameter.shape))[local_region(parameter)])


def local_part(parameter: Tensor) -> Tensor:
    """Return what this rank has of a parameter; it shares memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_region(parameter: Tensor) -> tuple[slice, ...]:
    """Return which part of the whole tensor this rank has."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    sizes, starts = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))


def _values(
    module: nn.Module, leaf: str, name: str, seed: int
) -> Callable[[tuple[int, ...]], Tensor]:
    def values(shape: tuple[int, ...]) -> Tensor:
        if isinstance(module, RMSNorm):
            return torch.full(shape, 0.0 if module.offset else 1.0)
        if isinstance(module, Factor):
            return module.initial(shape, _generator(name, seed))
        if leaf == "bias":
            return torch.zeros(shape)
        return torch.empty(shape).normal_(0.0, _DEVIATION, generator=_generator(name, seed))

    return values


def _generator(name: str, seed: int) -> torch.Generator:
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
