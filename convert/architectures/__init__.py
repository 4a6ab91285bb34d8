"""Architectures: one declarative file per model family, found by discovery.

Every module here whose name has no leading underscore holds an ``ARCHITECTURE`` record; adding a
family means adding one file.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from types import MappingProxyType

from ...errors import ConfigError, UnsupportedError, did_you_mean
from ._config import complete_config, layer_count
from ._mapping import MappedTensor, map_tensors
from ._metadata import model_entries
from ._record import Architecture, Config, TensorRule, dimensions
from ._transforms import TRANSFORMS, Transform

__all__ = [
    "TRANSFORMS",
    "Architecture",
    "MappedTensor",
    "TensorRule",
    "Transform",
    "architectures",
    "complete_config",
    "dimensions",
    "find_architecture",
    "layer_count",
    "map_tensors",
    "model_entries",
]


@cache
def architectures() -> MappingProxyType[str, Architecture]:
    """Return all architectures by GGUF name."""
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            record: Architecture = import_module(f".{module.name}", __name__).ARCHITECTURE
            found[record.name] = record
    return MappingProxyType(found)


def find_architecture(config: Config | None) -> Architecture:
    """Return the architecture of a ``config.json``, by its ``architectures`` entry.

    Raises:
        ConfigError: there is no configuration, or it names no class.
        UnsupportedError: no architecture serves the class.
    """
    if config is None:
        raise ConfigError(
            "the checkpoint comes without a config.json, which says what model it is; pass one "
            "(--config FILE)"
        )
    by_class = {name: record for record in architectures().values() for name in record.classes}
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise ConfigError(
            "config.json: 'architectures' does not name the model's class, such as "
            "['LlamaForCausalLM']"
        )
    if named[0] not in by_class:
        hint = did_you_mean(named[0], by_class)
        raise UnsupportedError(
            f"config.json: model class {named[0]!r} is not supported{hint}; supported: "
            f"{', '.join(sorted(by_class))}"
        )
    return by_class[named[0]]
