"""Collecting the rules of a checkpoint whose layers are numbered within a word, or stacked.

JAX and TensorFlow write ``layers_0`` where a table has a number of its own, and scanned layers are
one tensor. Rules are therefore made for the checkpoint at hand, one per layer or one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ...errors import ConfigError
from ...shardio.checkpoint import Checkpoint
from ...shardio.tensor import LazyTensor
from ._steps import layers as stacked_layers
from ._world import Variant
from .table import Rule
from .transforms import Transform

_MOST_LAYERS = 2000  # of a model that anybody trained; a config.json may say anything
Right = str | tuple[str, ...]


def layer_count(ckpt: Checkpoint, *keys: str) -> int:
    """Return the number of layers that the config says.

    Raises:
        ConfigError: none, or one that no model has.
    """
    config = ckpt.config or {}
    for key in (*keys, "num_hidden_layers", "n_layer", "num_layers"):
        value = config.get(key)
        if value is not None:
            if type(value) is not int or not 0 < value <= _MOST_LAYERS:
                raise ConfigError(f"{ckpt.path}: the config says {key} = {value!r}")
            return value
    raise ConfigError(f"{ckpt.path}: the config has no num_hidden_layers")


def root_of(names: Iterable[str], tail: str) -> str | None:
    """Return what comes before ``tail`` in the name that ends so, or None."""
    return next((n[: -len(tail)] for n in names if n == tail or n.endswith(f".{tail}")), None)


class Lines:
    """Collects rules.

    Attributes:
        weights: of the checkpoint, in either naming.
        layers: how many the model has.
        rules: what was collected.
    """

    def __init__(self, weights: Mapping[str, LazyTensor], layers: int) -> None:
        self.weights = weights
        self.layers = layers
        self.rules: list[Rule] = []

    def one(self, left: str, right: Right, how: str | Transform = "same", need: str = "") -> None:
        """A tensor outside the layers."""
        self.rules.append(Rule((left,), _sides(right), how, need))

    def each(self, left: str, right: Right, how: str | Transform = "same", need: str = "") -> None:
        """One rule per layer; ``{i}`` is its number on both sides."""
        for i in range(self.layers):
            sides = tuple(_numbered(s, i) for s in _sides(right))
            wanted = "|".join(f"{n} of layer {i}" for n in need.split("|") if n)
            self.rules.append(Rule((_numbered(left, i),), sides, how, wanted))

    def stacked(
        self,
        left: str,
        right: Right,
        how: str | Transform = "same",
        need: str = "",
        *,
        axis: int = 0,
        which: range | None = None,
    ) -> None:
        """One rule for the layers ``which`` (all) that a tensor holds along ``axis``."""
        chosen = range(self.layers) if which is None else which
        sides = tuple(_numbered(s, i) for i in chosen for s in _sides(right))
        self.rules.append(Rule((left,), sides, stacked_layers(axis, len(chosen), how), need))


class Variants(Mapping[str, Variant]):
    """Variants of a checkpoint by model type, made when asked for."""

    def __init__(self, architectures: Mapping[str, str], make: Callable[[str], list[Rule]]) -> None:
        self._architectures = architectures
        self._make = make

    def __getitem__(self, kind: str) -> Variant:
        return Variant(self._architectures[kind], tuple(self._make(kind)))

    def __contains__(self, kind: object) -> bool:
        return kind in self._architectures

    def __iter__(self) -> Iterator[str]:
        return iter(self._architectures)

    def __len__(self) -> int:
        return len(self._architectures)


def _sides(right: Right) -> tuple[str, ...]:
    return (right,) if isinstance(right, str) else right


def _numbered(pattern: str, i: int) -> str:
    return pattern.replace("{i}", str(i))


def config_of(ckpt: Checkpoint) -> Mapping[str, Any]:
    """The config.json in use, or nothing."""
    return ckpt.config or {}
