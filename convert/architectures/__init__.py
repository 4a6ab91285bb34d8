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
from ._bert_like import POOLING
from ._config import complete_config, layer_count
from ._lines import Line, table_lines
from ._mapping import (
    MappedTensor,
    Match,
    map_tensors,
    mapped_tensors,
    match_tensors,
    stacking,
)
from ._metadata import model_entries
from ._record import Architecture, Config, TensorRule, dimensions
from ._restore import Stored, restored_config
from ._transforms import TRANSFORMS, Transform

__all__ = [
    "POOLING",
    "TRANSFORMS",
    "Architecture",
    "Line",
    "MappedTensor",
    "Match",
    "Stored",
    "TensorRule",
    "Transform",
    "architectures",
    "complete_config",
    "dimensions",
    "find_architecture",
    "layer_count",
    "map_tensors",
    "mapped_tensors",
    "match_tensors",
    "model_entries",
    "restored_config",
    "stacking",
    "table_lines",
]


@cache
def architectures() -> MappingProxyType[str, Architecture]:
    """Return all architectures by the name of their module; several may share a GGUF name."""
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            record: Architecture = import_module(f".{module.name}", __name__).ARCHITECTURE
            found[module.name] = record
    return MappingProxyType(found)


def find_architecture(config: Config | None) -> Architecture:
    """Return the architecture of a ``config.json``: by its class, else by its ``model_type``.

    Raises:
        ConfigError: there is no configuration, or it names neither.
        UnsupportedError: no architecture serves the class.
    """
    if config is None:
        raise ConfigError(
            "the checkpoint comes without a config.json, which says what model it is; pass one "
            "(--config FILE)"
        )
    known = architectures().values()
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and isinstance(classes[0], str):
        name, table = classes[0], {name: r for r in known for name in r.classes}
    elif isinstance(config.get("model_type"), str):
        name, table = config["model_type"], {name: r for r in known for name in r.defaults}
    else:
        raise ConfigError(
            "config.json: neither 'architectures' (such as ['LlamaForCausalLM']) nor 'model_type' "
            "says what model it is"
        )
    if name not in table:
        raise UnsupportedError(
            f"config.json: model {name!r} is not supported{did_you_mean(name, table)}; supported: "
            f"{', '.join(sorted(table))}"
        )
    return table[name]
