"""Factors beside GGUF weights: ``X.scale`` is what a runtime multiplies the product of X with.

NVFP4 has one per matrix, or one per expert of a stack, for what FP8 block scales cannot hold;
ternary weights (BitNet) have their only scale there. ``X.input_scale`` is what a runtime may
quantize the product's other side with; weights do not depend on it. Source: llama.cpp ``src``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ...shardio.box import Box
from ...shardio.tensor import LazyTensor
from .reader import GgufFile
from .tensors import GgufTensors

_WEIGHT, _SCALE, _INPUT = ".weight", ".scale", ".input_scale"
_FLOAT32 = np.dtype(np.float32)


class Factored(LazyTensor):
    """A weight times its factor, float32; a stack of experts has a factor for each."""

    __slots__ = ("_base", "_factor")

    def __init__(self, base: LazyTensor, factor: LazyTensor) -> None:
        """Take the weight, and float32 [1] or [experts]."""
        super().__init__(base.shape, _FLOAT32)
        self._base = base
        self._factor = factor

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Read the weight's region and multiply."""
        if self._base.dtype == _FLOAT32:
            self._base.fill(out, box)
        else:
            out[...] = self._base.read([slice(a, b) for a, b in zip(*box, strict=True)])
        cut = slice(0, 1) if self._factor.size == 1 else slice(box[0][0], box[1][0])
        out *= self._factor.read([cut]).reshape(-1, *[1] * (self.ndim - 1))

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """The file pieces of the weight and of its factor."""
        yield from self._base.spans()
        yield from self._factor.spans()

    def leaves(self) -> Iterator[LazyTensor]:
        """The leaves of the weight and of its factor."""
        yield from self._base.leaves()
        yield from self._factor.leaves()


def factors_beside(file: GgufFile) -> tuple[dict[str, str], frozenset[str]]:
    """Return weight -> its factor, and every name that is a factor of a weight or its input.

    A factor is one float32 number, or one per expert of a stack; anything else is no factor.
    """
    found: dict[str, str] = {}
    names = set()
    for name, info in file.tensors.items():
        end = next((e for e in (_INPUT, _SCALE) if name.endswith(e)), "")
        weight = file.tensors.get(name.removesuffix(end) + _WEIGHT) if end else None
        if weight is None or info.type.name != "F32":
            continue
        if info.shape != (1,) and (len(weight.shape) != 3 or info.shape != weight.shape[:1]):
            continue
        names.add(name)
        if end == _SCALE:
            found[name.removesuffix(end) + _WEIGHT] = name
    return found, frozenset(names)


def factored_values(tensors: GgufTensors, factors: Mapping[str, str], name: str) -> LazyTensor:
    """Return a tensor's values, multiplied with its factor where it has one."""
    base = tensors.values(name)
    factor = factors.get(name)
    return base if factor is None else Factored(base, tensors.values(factor))
