"""Read a GGUF file back and compare every tensor with the checkpoint it came from.

Floats must equal the source cast to their type, bit for bit. Quantized tensors are decoded and
measured: relative RMSE = |decoded - source| / |source|. It must stay under 2^(1.5 - bits per
weight); Gaussian weights give about 2^(1 - bpw) from Q4_K (4.5 bits, 0.08) to Q8_0 (8.5, 0.005).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..quant import GgmlType, dequantize
from ..shardio import Checkpoint
from ..shardio.tensor import LazyTensor
from .gguf import GgufFile, open_gguf
from .to_gguf import to_gguf

_SLAB = 1 << 22  # elements compared at a time


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One tensor: ``error`` is the relative RMSE, ``exact`` whether no bit differs."""

    name: str
    type: GgmlType
    exact: bool
    error: float

    @property
    def ok(self) -> bool:
        """Whether the tensor is what its type promises."""
        if self.type.is_quantized:
            return self.error <= 2 ** (1.5 - self.type.bpw)
        return self.exact


@dataclass(frozen=True, slots=True)
class GgufCheck:
    """A whole file; ``missing`` and ``extra`` are GGUF names."""

    path: Path
    tensors: tuple[TensorCheck, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every tensor is there and what its type promises."""
        return not self.missing and not self.extra and all(t.ok for t in self.tensors)

    def worst(self) -> dict[str, float]:
        """Return the largest error per type name."""
        out: dict[str, float] = {}
        for t in self.tensors:
            out[t.type.name] = max(out.get(t.type.name, 0.0), t.error)
        return out


def verify_gguf(path: str | Path, src: Checkpoint | str | Path) -> GgufCheck:
    """Compare a GGUF file with the checkpoint ``src``.

    Raises:
        MconvError: either cannot be opened, or the checkpoint cannot be converted.
    """
    file = open_gguf(path)
    planned = {t.name: t.tensor for t in to_gguf(src, path, "f32", dry_run=True).tensors}
    return GgufCheck(
        Path(path),
        tuple(_check(file, n, planned[n]) for n in file.tensors if n in planned),
        tuple(n for n in planned if n not in file.tensors),
        tuple(n for n in file.tensors if n not in planned),
    )


def _check(file: GgufFile, name: str, source: LazyTensor) -> TensorCheck:
    info = file.tensors[name]
    if info.shape != source.shape:
        return TensorCheck(name, info.type, False, float("inf"))
    exact, wrong, size = True, 0.0, 0.0
    for stored, wanted in _slabs(file, name, source):
        exact = exact and _same_bits(stored, wanted.astype(stored.dtype))
        want = wanted.astype(np.float64)
        wrong += float(np.square(stored.astype(np.float64) - want).sum())
        size += float(np.square(want).sum())
    return TensorCheck(name, info.type, exact, (wrong / size) ** 0.5 if size else wrong)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def _slabs(
    file: GgufFile, name: str, source: LazyTensor
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (stored, source) values of successive parts along the first dim."""
    info = file.tensors[name]
    rows = info.shape[0] if info.shape else 1
    step = max(1, _SLAB * rows // max(1, source.size))
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        wanted = source.read((part, *(slice(0, n) for n in info.shape[1:])))
        if info.type.is_quantized:
            raw = file.raw(name).reshape(rows, -1)[part]
            yield dequantize(raw, info.type, wanted.shape), wanted
        else:
            yield file.array(name)[part], wanted
