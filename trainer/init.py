"""Memory and initial weights, independent of the parallel layout: drawn, or those of a checkpoint.

Every parameter has a generator of its own, seeded by its name and the run's seed; a rank draws the
whole tensor in float32 and keeps its region. (Drawing into a ``DTensor`` shard directly would give
every rank the same numbers on CPU, and other numbers for every layout.) Of a checkpoint, of any
format and layout that ``shardio`` opens, a rank reads the regions of its own shards and nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..convert.naming import to_hf
from ..convert.reshard import opened
from ..errors import ConfigError
from ..shardio import Checkpoint, LazyTensor
from .attention import RMSNorm
from .lora.linear import Factor
from .model import Decoder
from .moe import expert_names
from .settings.model import ModelConfig

_DEVIATION = 0.02
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def materialize(part: Decoder, seed: int, device: torch.device | str = "cpu") -> None:
    """Allocate a model part built on the meta device (cut or not) and fill it, in place.

    Norms are the identity, biases zero, all others N(0, 0.02²). A tied head is tied again: leaving
    the meta device parts shared parameters.
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


def open_weights(path: Path, config: ModelConfig) -> Checkpoint:
    """Open a checkpoint with Hugging Face names.

    Raises:
        MconvError: it cannot be opened or renamed.
    """
    return to_hf(opened(path, None), vocab_size=config.vocab_size, model_type=config.model_type)


def load_weights(parts: Iterable[Decoder], ckpt: Checkpoint, adapters: bool = False) -> None:
    """Fill model parts from a checkpoint with Hugging Face names, in place.

    Without ``adapters``, which no base checkpoint has, these keep their initial values.

    Raises:
        ConfigError: a weight is missing or of another shape.
    """
    aliases = {alias: name for alias, name in ckpt.tied.items() if name in ckpt.weights}
    weights = {**ckpt.weights, **{a: ckpt.weights[name] for a, name in aliases.items()}}
    for part in parts:
        for name, parameter in part.named_parameters():
            if adapters or ".lora_" not in name:
                read_into(parameter, source_name(part, name), part.config, weights, ckpt.path)


def read_into(
    parameter: Tensor,
    name: str,
    config: ModelConfig,
    weights: Mapping[str, LazyTensor],
    path: Path,
) -> None:
    """Fill this rank's part of one parameter (or optimizer state) from tensors by name, in place.

    Raises:
        ConfigError: it is missing or of another shape.
    """
    stack = expert_names(config, name)
    shape = list(parameter.shape[1:] if stack else parameter.shape)
    found = []
    for one in stack or [name]:
        if one not in weights:
            raise ConfigError(f"{path}: no weight {one}, which [model] asks for")
        if list(weights[one].shape) != shape:
            raise ConfigError(
                f"{path}: {one} has shape {list(weights[one].shape)}, but the model has {shape}; "
                "set [model] to the sizes of the checkpoint"
            )
        found.append(weights[one])
    region, local = local_region(parameter), local_part(parameter)
    with torch.no_grad():
        if stack is None:
            local.copy_(_tensor(found[0].read(region)))
            return
        for target, tensor in zip(local, found[region[0]], strict=True):
            target.copy_(_tensor(tensor.read(region[1:])))


def _tensor(values: np.ndarray) -> Tensor:
    """Return a tensor of the same values; types that torch takes no arrays of become float32."""
    if values.dtype.kind not in "fiub" or values.dtype.name.startswith(("bfloat", "float8")):
        values = values.astype(np.float32)
    return torch.from_numpy(values)
