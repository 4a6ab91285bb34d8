"""Changing metadata on the way from one GGUF file to another: set, drop, override, prune layers.

Setting a key moves it to the end, as ggml does, so that files compare equal byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...errors import ConfigError
from ...quant.recipes import ModelFacts
from .values import KeyValue, ValueType, boolean, f32, string, u32

_LAYER = re.compile(r"blk\.(\d+)\.")


def set_entry(entries: Iterable[KeyValue], new: KeyValue) -> list[KeyValue]:
    """Return the entries with ``new`` at the end, in place of any with the same key."""
    return [*without(entries, [new.key]), new]


def without(entries: Iterable[KeyValue], keys: Sequence[str]) -> list[KeyValue]:
    """Return the entries whose key is not in ``keys``."""
    return [entry for entry in entries if entry.key not in keys]


def parse_override(text: str) -> KeyValue:
    """Parse ``KEY=TYPE:VALUE`` with type ``int``, ``float``, ``bool`` or ``str``.

    Whole numbers become u32, as llama-quantize stores them, unless they do not fit.

    Raises:
        ConfigError: another form, or a value that is not of its type.
    """
    key, equals, typed = text.partition("=")
    kind, colon, value = typed.partition(":")
    if not (key and equals and colon):
        raise ConfigError(f"{text!r} is not of the form KEY=TYPE:VALUE, such as a.b=int:4")
    try:
        if kind == "int":
            return _integer(key, int(value))
        if kind == "float":
            return f32(key, float(value))
    except ValueError:
        raise ConfigError(f"{text!r}: {value!r} is not {kind}") from None
    if kind == "bool" and value in ("true", "false"):
        return boolean(key, value == "true")
    if kind == "str":
        return string(key, value)
    if kind == "bool":
        raise ConfigError(f"{text!r}: a bool is true or false")
    raise ConfigError(f"{text!r}: type {kind!r} is none of int, float, bool, str")


def _integer(key: str, value: int) -> KeyValue:
    if value < 0:
        return KeyValue(key, ValueType.I32 if value >= -(2**31) else ValueType.I64, value)
    return u32(key, value) if value < 2**32 else KeyValue(key, ValueType.U64, value)


def model_facts(entries: Iterable[KeyValue]) -> ModelFacts:
    """Return what the recipes ask about a model.

    Raises:
        ConfigError: ``general.architecture`` is missing.
    """
    values = {entry.key: entry.value for entry in entries}
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        raise ConfigError(
            "the metadata has no general.architecture: this is not a model; "
            "--override-kv general.architecture=str:llama can supply it"
        )
    heads = _count(values, f"{architecture}.attention.head_count", 0)
    return ModelFacts(
        architecture,
        layers=_count(values, f"{architecture}.block_count", 0),
        heads=heads,
        kv_heads=_count(values, f"{architecture}.attention.head_count_kv", heads),
        experts=_count(values, f"{architecture}.expert_count", 0),
        nextn_layers=_count(values, f"{architecture}.nextn_predict_layers", 0),
    )


def _count(values: Mapping[str, object], key: str, default: int) -> int:
    """A whole number; of a per-layer array the first layer's."""
    value = values.get(key, default)
    if isinstance(value, np.ndarray):
        value = value[0] if value.size else default
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigError(f"metadata key {key!r} is {value!r}, not a whole number")
    return int(value)


@dataclass(frozen=True, slots=True)
class Pruning:
    """Layers taken out of a model; those left are numbered anew.

    Attributes:
        dropped: layer numbers, ascending.
        layers: number of layers before.
    """

    dropped: tuple[int, ...]
    layers: int

    @classmethod
    def of(cls, dropped: Iterable[int], layers: int) -> Pruning:
        """Check the layer numbers.

        Raises:
            ConfigError: a layer that the model does not have, or none would be left.
        """
        wanted = tuple(sorted(set(dropped)))
        for layer in wanted:
            if not 0 <= layer < layers:
                raise ConfigError(f"cannot prune layer {layer}: the model has 0 to {layers - 1}")
        if wanted and len(wanted) == layers:
            raise ConfigError("pruning every layer leaves no model")
        return cls(wanted, layers)

    def renamed(self, name: str) -> str | None:
        """Return a tensor's name in the pruned model, or None when it goes."""
        match = _LAYER.search(name)
        if match is None or not self.dropped:
            return name
        layer = int(match[1])
        if layer in self.dropped:
            return None
        new = layer - sum(1 for gone in self.dropped if gone < layer)
        return f"{name[: match.start(1)]}{new}{name[match.end(1) :]}"

    def entries(self, entries: Iterable[KeyValue], architecture: str) -> list[KeyValue]:
        """Return the metadata of the pruned model: layer count and per-layer arrays."""
        if not self.dropped:
            return list(entries)
        out = [self._cut(e) if e.key.startswith(f"{architecture}.") else e for e in entries]
        return set_entry(out, u32(f"{architecture}.block_count", self.layers - len(self.dropped)))

    def _cut(self, entry: KeyValue) -> KeyValue:
        value = entry.value
        if not isinstance(value, np.ndarray) or len(value) != self.layers:
            return entry
        return replace(entry, value=np.delete(value, self.dropped))
