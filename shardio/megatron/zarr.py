"""Tensors of Megatron's ``zarr`` checkpoints (core 0.4 to 0.15, NeMo 1): plain chunk files.

One folder per key with ``.zarray`` (zarr v2 metadata) and uncompressed chunk files ``i.j.k``. The
dtype is the literal ``bfloat16`` for bf16, which the zarr library does not know. A chunk file that
is absent stands for the fill value; Megatron always writes all, so here it is a missing file.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FormatError, UnsupportedError
from ..assets import load_json
from ..box import row_major
from ..chunked import Chunk, Chunked
from ..dtypes import from_torch
from ..source import FileSource, Source

ARRAY = ".zarray"
Unpack = Callable[[Path, object, int], Source]


def zarr_keys(folder: Path) -> list[Path]:
    """Return the array folders of a checkpoint, sorted."""
    return sorted(p for p in folder.iterdir() if (p / ARRAY).is_file())


def open_array(folder: Path, unpack: Unpack | None = None) -> Chunked:
    """Return the lazy tensor of one array folder.

    Args:
        folder: with ``.zarray``.
        unpack: gives the source of a compressed chunk file (file, compressor, bytes of the chunk);
            None where compression is not expected.

    Raises:
        FormatError: malformed metadata, missing or short chunk files.
        UnsupportedError: compressed, filtered or Fortran-ordered arrays.
    """
    meta = load_json(folder / ARRAY)
    shape, chunks = _sizes(folder, meta, "shape"), _sizes(folder, meta, "chunks")
    if len(shape) != len(chunks) or 0 in chunks:
        raise FormatError(f"{folder / ARRAY}: shape {shape} with chunks {chunks}")
    compressor = meta.get("compressor") if unpack is not None else None
    refused = (("filters", None), ("order", "C"), ("compressor", compressor))
    for key, plain in refused:
        if meta.get(key) not in (plain, []):
            raise UnsupportedError(f"{folder / ARRAY}: {key} is {meta[key]!r}, expected {plain!r}")
    dtype = _dtype(folder, meta.get("dtype"))
    separator = str(meta.get("dimension_separator", "."))
    grid = [range(-(-n // c)) for n, c in zip(shape, chunks, strict=True)]
    need = prod(chunks) * dtype.itemsize
    strides = row_major(chunks, dtype.itemsize)
    pieces = []
    for index in product(*grid):
        file = folder / (separator.join(map(str, index)) or "0")
        source: Source = FileSource.of(file)
        if unpack is not None and compressor is not None:
            source = unpack(file, compressor, need)
        if source.size != need:
            raise FormatError(f"{file}: has {source.size} bytes, a chunk {chunks} has {need}")
        lo = tuple(i * c for i, c in zip(index, chunks, strict=True))
        hi = tuple(min(a + c, n) for a, c, n in zip(lo, chunks, shape, strict=True))
        pieces.append(Chunk(lo, hi, source, 0, strides))
    return Chunked(shape, dtype, pieces)


def _sizes(folder: Path, meta: Any, key: str) -> tuple[int, ...]:
    sizes = meta.get(key) if isinstance(meta, dict) else None
    if not isinstance(sizes, list) or any(type(n) is not int or n < 0 for n in sizes):
        raise FormatError(f"{folder / ARRAY}: has no {key}")
    return tuple(sizes)


def _dtype(folder: Path, name: object) -> np.dtype:
    if isinstance(name, str) and name.startswith(("bfloat16", "float8_")):
        return from_torch(name)  # as JAX and Megatron name what zarr lacks
    try:
        dtype = np.dtype(str(name))
    except TypeError:
        dtype = np.dtype("O")
    if dtype.kind not in "fiub" or dtype.byteorder == ">":
        raise UnsupportedError(f"{folder / ARRAY}: dtype {name!r}")
    return dtype
