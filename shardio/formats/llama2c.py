"""llama2.c's ``.bin``: the legacy layout and versions 1 (float32) and 2 (Q8_0).

Legacy files begin with seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
max_seq_len; a negative vocabulary says that the head is a tensor of its own), later ones with
``ak42``, the version and 256 bytes of header. Tensors of all layers follow each other. Version 2
keeps int8 groups with a scale each, which are decoded when read. Names are Meta's. Source:
karpathy's llama2.c ``export.py``, ``run.c``, ``runq.c``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from ...errors import FormatError, UnsupportedError
from ..checkpoint import Checkpoint
from ..chunked import Chunked
from ..coverage import prove
from ..dequant.scaled import scaled
from ..layout import Layout
from ..registry import Format, OpenOptions
from ..source import FileSource, open_file
from ..state_checkpoint import model_files
from ..tensor import LazyTensor

_MAGIC = struct.pack("<I", 0x616B3432)
_LEGACY_HEADER, _HEADER = 28, 256
_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_F32, _I8 = np.dtype("<f4"), np.dtype("i1")
_LEVELS = (-127, 127)
_NORM_EPS = 1e-5  # of ModelArgs and of run.c; no file says it


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file says of itself; ``version`` 0 is the legacy layout."""

    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int
    own_head: bool = False
    group: int = 0

    @property
    def start(self) -> int:
        """Where the tensors begin."""
        return _HEADER if self.version else _LEGACY_HEADER

    def problem(self) -> str:
        """What no model can be, or nothing."""
        numbers = {k: getattr(self, k) for k in _FIELDS}
        wrong = {k: v for k, v in numbers.items() if not 0 < v < 1 << 31}
        if wrong:
            return f"{next(iter(wrong))} is {next(iter(wrong.values()))}"
        if self.n_layers > 10000 or self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            return (
                f"{self.n_layers} layers of {self.n_heads} heads ({self.n_kv_heads} for keys) "
                f"do not fit the width {self.dim}"
            )
        if self.version == 2 and not 0 < self.group <= self.dim:
            return f"the groups have {self.group} weights"
        return ""

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Yield (name, shape, whether it is quantized in version 2) in the file's order."""
        d, ff, head = self.dim, self.hidden_dim, self.dim // self.n_heads
        kv = self.n_kv_heads * head
        matrices: dict[str, tuple[int, ...]] = {
            "attention.wq": (d, d), "attention.wk": (kv, d), "attention.wv": (kv, d),
            "attention.wo": (d, d), "ffn_norm": (d,), "feed_forward.w1": (ff, d),
            "feed_forward.w2": (d, ff), "feed_forward.w3": (ff, d),
        }  # fmt: skip
        embedding = ("tok_embeddings.weight", (self.vocab_size, d), True)
        norms: dict[str, tuple[int, ...]] = {"attention_norm": (d,), "ffn_norm": (d,)}
        if self.version:
            yield from self._all(norms)
            yield "norm.weight", (d,), False
            yield embedding
            del matrices["ffn_norm"]
            yield from self._all(matrices)
        else:
            yield embedding
            yield from self._all({"attention_norm": (d,), **matrices})
            yield "norm.weight", (d,), False
            for name in ("freqs_cos", "freqs_sin"):
                yield name, (self.max_seq_len, head // 2), False
        if self.own_head:
            yield "output.weight", (self.vocab_size, d), True

    def _all(
        self, parts: dict[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        for name, shape in parts.items():
            for i in range(self.n_layers):
                yield f"layers.{i}.{name}.weight", shape, len(shape) > 1

    def nbytes(self, shape: tuple[int, ...], quantized: bool) -> int:
        """Bytes of a tensor."""
        n = prod(shape)
        return n + 4 * (n // self.group) if quantized and self.version == 2 else 4 * n

    def total(self) -> int:
        """Bytes of the file."""
        return self.start + sum(self.nbytes(s, q) for _, s, q in self.tensors())


def detect(path: Path) -> Path | None:
    """Return the file, or the only one of a folder."""
    if path.is_file():
        return path if path.suffix == ".bin" and _header(path) is not None else None
    try:
        found = [p for p in sorted(path.glob("*.bin")) if _header(p) is not None]
    except OSError:
        return None
    return found[0] if len(found) == 1 else None


def _header(path: Path) -> _Header | None:
    """Return the header of a file that can be one of llama2.c, or None. A legacy file has no mark:
    its size must be what the numbers demand.
    """
    try:
        with open_file(path) as file:
            raw = file.read(_HEADER)
            size = path.stat().st_size
    except OSError:
        return None
    if raw[:4] == _MAGIC and len(raw) == _HEADER:
        version = int.from_bytes(raw[4:8], "little", signed=True)
        shared, group = struct.unpack_from("<Bi", raw, 36)
        return replace(_numbers(version, raw[8:36]), own_head=not shared, group=group)
    if len(raw) < _LEGACY_HEADER:
        return None
    header = _numbers(0, raw[:_LEGACY_HEADER])
    vocab = header.vocab_size
    header = replace(header, vocab_size=abs(vocab), own_head=vocab < 0)
    return header if not header.problem() and _legacy_size(header) == size else None


def _numbers(version: int, raw: bytes) -> _Header:
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", raw)
    return _Header(version, dim, hidden, layers, heads, kv_heads, vocab, length)


def _legacy_size(header: _Header) -> int:
    """The file's size by arithmetic: ``detect`` looks at files of any kind."""
    d, ff, n = header.dim, header.hidden_dim, header.n_layers
    head = d // header.n_heads
    layer = 2 * d + 2 * d * d + 2 * header.n_kv_heads * head * d + 3 * ff * d
    outer = header.vocab_size * d * (2 if header.own_head else 1) + d
    return _LEGACY_HEADER + 4 * (outer + n * layer + 2 * header.max_seq_len * (head // 2))


def open_llama2c(root: Path, options: OpenOptions) -> Checkpoint:
    """Open one file.

    Raises:
        FormatError: senseless numbers, a file of another size than they demand.
        UnsupportedError: an unknown version.
    """
    header = _header(root)
    if header is None:
        raise FormatError(
            f"{root}: is no llama2.c file: it has no mark, and its size is not what its first "
            "seven numbers demand"
        )
    if header.version not in (0, 1, 2):
        raise UnsupportedError(f"{root}: llama2.c version {header.version}; 0 to 2 are read")
    problem = header.problem()
    if problem:
        raise FormatError(f"{root}: the header is damaged: {problem}")
    source = FileSource.of(root)
    if source.size != header.total():
        raise FormatError(
            f"{root}: has {source.size} bytes, its header demands {header.total()}: truncated, or "
            "another file behind it"
        )
    weights = dict(_weights(root, source, header))
    prove(weights, root)
    config, assets = model_files(root, options)
    args = {k: getattr(header, k) for k in _FIELDS if k != "hidden_dim"}
    return Checkpoint(
        path=root,
        format="llama2c",
        version=str(header.version),
        naming="meta",
        weights=weights,
        config=config,
        args={**args, "norm_eps": _NORM_EPS},
        layout=Layout(format="llama2c"),
        assets=assets,
    )


def _weights(root: Path, source: FileSource, header: _Header) -> Iterator[tuple[str, LazyTensor]]:
    at = header.start
    for name, shape, quantized in header.tensors():
        if quantized and header.version == 2:
            yield name, _grouped(f"{root}: {name}", source, at, shape, header.group)
        else:
            yield name, Chunked.contiguous(source, at, shape, _F32)
        at += header.nbytes(shape, quantized)


def _grouped(
    where: str, source: FileSource, at: int, shape: tuple[int, ...], group: int
) -> LazyTensor:
    """An int8 tensor followed by the scales of its groups, which run over row ends where the rows
    do not divide.
    """
    n = prod(shape)
    if n % group:
        raise FormatError(f"{where}: {n} weights do not divide into groups of {group}")
    rows = shape if shape[1] % group == 0 else (n // group, group)
    weight = Chunked.contiguous(source, at, rows, _I8)
    scales = Chunked.contiguous(source, at + n, (rows[0], rows[1] // group), _F32)
    whole = scaled(where, weight, scales, _F32, block=(1, group), levels=_LEVELS)
    return whole if rows == shape else whole.reshape(shape)


FORMAT = Format("llama2c", "llama2.c .bin", detect, open_llama2c, rank=85)
