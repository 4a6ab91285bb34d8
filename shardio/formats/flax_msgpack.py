"""Flax's MessagePack files: ``flax_model.msgpack`` of Hugging Face, EasyLM's streams of parameters.

Flax writes one map of maps whose leaves are arrays (extension 1: shape, dtype name, bytes; arrays
above 1 GB in chunks); EasyLM writes pairs (path, such an array) one after the other. Names are the
keys joined by dots. Source: flax ``serialization.py``, EasyLM ``checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ...errors import FormatError, UnsupportedError
from ..checkpoint import Checkpoint
from ..chunked import Chunked
from ..flat_buffer import Run, from_runs
from ..jax_checkpoint import jax_checkpoint
from ..msgpack_scan import Place, Scanner
from ..registry import Format, OpenOptions
from ..source import FileSource
from ..tensor import LazyTensor

_NAMES = ("flax_model.msgpack", "streaming_params", "streaming_train_state")
_ARRAY, _SCALAR = 1, 3  # extension codes of flax
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {n: np.dtype(getattr(ml_dtypes, n)) for n in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}
_PLAIN = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16",
          "uint32", "uint64", "bool")  # fmt: skip
_MAPS = (*range(0x81, 0x90), 0xDE, 0xDF)
_PAIR = 0x92


def detect(path: Path) -> Path | None:
    """Return the file, or the one of a folder by its usual names."""
    if path.is_file():
        usual = path.suffix == ".msgpack" or path.name.startswith(_NAMES)
        return path if usual and _starts_well(path) else None
    places = (path / n for n in _NAMES)
    return next((p for p in places if p.is_file() and _starts_well(p)), None)


def _starts_well(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(1)
    except OSError:
        return False
    return bool(start) and (start[0] in _MAPS or start[0] == _PAIR)


def open_msgpack(root: Path, options: OpenOptions) -> Checkpoint:
    """Open one file.

    Raises:
        FormatError: malformed or truncated data, arrays whose bytes do not fit their shapes.
        UnsupportedError: element types that mconv does not know.
    """
    source = FileSource.of(root)
    arrays: dict[str, LazyTensor] = {}
    try:
        with root.open("rb") as file:
            for name, value in _leaves(file, source.size):
                if name in arrays:
                    raise ValueError(f"{name!r} is there twice")
                tensor = _tensor(file, source, name, value)
                if tensor is not None:
                    arrays[name] = tensor
    except (ValueError, OverflowError) as e:
        raise FormatError(f"{root}: damaged or truncated ({e})") from e
    return jax_checkpoint(root, options, arrays, name="flax_msgpack")


def _leaves(file: BinaryIO, size: int) -> Iterator[tuple[str, Any]]:
    """Yield (name, place or chunks) of both kinds of files."""
    scanner = Scanner(file, size)
    while scanner.at < size:
        value = scanner.value()
        if isinstance(value, dict):
            yield from _flat(value, ())
            continue
        pair = isinstance(value, list) and len(value) == 2
        if not pair or not isinstance(value[0], list) or not isinstance(value[1], Place):
            raise ValueError("neither a map of arrays nor pairs of paths and arrays")
        inner = Scanner(file, value[1].offset + value[1].size, value[1].offset)
        yield ".".join(str(k) for k in value[0]), inner.value()
        file.seek(scanner.at)


def _flat(tree: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and _CHUNKED not in value:
            yield from _flat(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def _tensor(file: BinaryIO, source: FileSource, name: str, value: Any) -> LazyTensor | None:
    """Return the tensor of a leaf; None for plain values."""
    if isinstance(value, dict):
        shape = tuple(value.get("shape", {}).values())
        held = value.get("chunks", {}).values()
        parts = [_array(file, name, c) for c in held if isinstance(c, Place)]
        if not parts or len({dtype for _, dtype, _ in parts}) > 1:
            raise ValueError(f"{name!r} has no chunks of one type")
        dtype = parts[0][1]
        runs: list[Run] = [(source, p.offset, p.size // dtype.itemsize) for _, _, p in parts]
        if _volume(shape) != sum(count for _, _, count in runs):
            raise ValueError(f"the chunks of {name!r} do not make {list(shape)}")
        return from_runs(shape, dtype, partial(list, runs))
    if not isinstance(value, Place) or value.code not in (_ARRAY, _SCALAR):
        return None
    shape, dtype, place = _array(file, name, value)
    return Chunked.contiguous(source, place.offset, shape, dtype)


def _array(file: BinaryIO, name: str, value: Place) -> tuple[tuple[int, ...], np.dtype, Place]:
    """Parse (shape, dtype name, bytes) of an array's payload."""
    parts = Scanner(file, value.offset + value.size, value.offset).value()
    if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[2], Place):
        raise ValueError(f"{name!r} is no array")
    shape, kind, place = parts
    if kind not in _PLAIN and kind not in _DTYPES:
        raise UnsupportedError(f"{name!r} has the element type {kind!r}")
    dtype = _DTYPES[kind] if kind in _DTYPES else np.dtype(kind).newbyteorder("<")
    if not isinstance(shape, list) or _volume(shape) * dtype.itemsize != place.size:
        raise ValueError(f"{name!r} {shape} of {kind} has {place.size} bytes")
    return tuple(shape), dtype, place


def _volume(shape: Any) -> int:
    if any(type(n) is not int or not 0 <= n < 2**48 for n in shape):
        raise ValueError(f"a shape {list(shape)[:8]}")
    return prod(shape)


FORMAT = Format("flax_msgpack", "Flax .msgpack, EasyLM stream", detect, open_msgpack, rank=82)
