"""Starting from a checkpoint: of any format and layout that shardio opens, into any layout here.

A rank reads the regions of its own shards and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..convert.naming import to_hf
from ..convert.reshard import opened
from ..errors import ConfigError
from ..shardio import Checkpoint, LazyTensor
from .init import local_part, local_region, source_name
from .model import Decoder
from .model_config import ModelConfig
from .moe import expert_names


def open_weights(path: Path, config: ModelConfig) -> Checkpoint:
    """Open a checkpoint with Hugging Face names.

    Raises:
        MconvError: it cannot be opened or renamed.
    """
    return to_hf(opened(path, None), vocab_size=config.vocab_size, model_type=config.model_type)


def load_weights(parts: Iterable[Decoder], checkpoint: Checkpoint) -> None:
    """Fill model parts from a checkpoint with Hugging Face names, in place.

    Adapters, which no base checkpoint has, keep their initial values.

    Raises:
        ConfigError: a weight is missing or of another shape.
    """
    weights = {
        **checkpoint.weights,
        **{alias: checkpoint.weights[name] for alias, name in checkpoint.tied.items()},
    }
    for part in parts:
        for name, parameter in part.named_parameters():
            if ".lora_" in name:
                continue
            read_into(parameter, source_name(part, name), part.config, weights, checkpoint.path)


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
    found = [_found(weights, one, path) for one in stack or [name]]
    shape = tuple(parameter.shape[1:] if stack else parameter.shape)
    for one, tensor in zip(stack or [name], found, strict=True):
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{path}: {one} has shape {list(tensor.shape)}, but the model has {list(shape)}; "
                "set [model] to the sizes of the checkpoint"
            )
    region = local_region(parameter)
    read = _stacked(found, region) if stack else (lambda: found[0].read(region))
    with torch.no_grad():
        local_part(parameter).copy_(_tensor(read()))


def _found(weights: Mapping[str, LazyTensor], name: str, path: Path) -> LazyTensor:
    if name not in weights:
        raise ConfigError(f"{path}: no weight {name}, which [model] asks for")
    return weights[name]


def _stacked(tensors: list[LazyTensor], region: tuple[slice, ...]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        parts = [tensor.read(region[1:]) for tensor in tensors[region[0]]]
        empty = tuple(s.stop - s.start for s in region)
        return np.stack(parts) if parts else np.empty(empty, tensors[0].dtype)

    return read


def _tensor(values: np.ndarray) -> Tensor:
    """Return a tensor of the same values; types that torch takes no arrays of become float32."""
    if values.dtype.kind not in "fiub" or values.dtype.name.startswith(("bfloat", "float8")):
        values = values.astype(np.float32)
    return torch.from_numpy(values)
