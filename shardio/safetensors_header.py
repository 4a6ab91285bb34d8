"""Read and write safetensors headers strictly, without touching tensor data.

Format: github.com/huggingface/safetensors: 8 bytes little-endian header length, JSON, then the
data. Reading refuses whatever the reference implementation refuses (and duplicate JSON keys);
writing gives the same bytes: no spaces in the JSON, ``__metadata__`` first, padded with spaces to
a multiple of 8.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import ml_dtypes
import numpy as np

from ..errors import FormatError, UnsupportedError
from . import dtypes
from .source import open_file

MAX_HEADER = 100_000_000
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_F4 = np.dtype(ml_dtypes.float4_e2m1fn)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: ``dtype``, ``shape``, and its bytes [``start``, ``stop``) in the file.

    Float4 tensors are packed, two elements per byte: ``stop - start`` is half the element count.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file.

    Attributes:
        tensors: entries by name, in file (data) order.
        metadata: the free text map, empty if absent.
        data_start: first byte behind the header.
        file_size: bytes.
    """

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int
    file_size: int


def read_header(path: Path) -> Header:
    """Read and check the header of ``path``.

    Raises:
        FormatError: truncated (with the number of missing bytes), overlapping, with holes, or not
            safetensors at all.
        UnsupportedError: an element type that mconv does not know.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            raw = _read_json(path, file.read(8), size)
            text = file.read(raw)
    except OSError as e:
        raise FormatError(f"{path}: cannot be read: {e.strerror}") from None
    if len(text) != raw:
        _fail(path, f"the file ended while its header of {raw} bytes was read")
    return _parse(path, text, size)


def _read_json(path: Path, prefix: bytes, size: int) -> int:
    """Return the length of the JSON in bytes after checking it against the file."""
    if size < 8:
        _fail(path, f"the file has {size} bytes, too few for a safetensors header")
    if prefix == b"version ":
        _fail(path, "this is a git-lfs pointer: fetch the real file with 'git lfs pull'")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        _fail(path, f"not safetensors: its header would have {length} bytes (limit {MAX_HEADER})")
    if 8 + length > size:
        _fail(path, f"truncated: the header needs {8 + length} bytes, the file has {size}")
    return length


def _parse(path: Path, text: bytes, size: int) -> Header:
    if text[:1] != b"{":
        _fail(path, "not safetensors: the header does not start with '{'")

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a name occurs twice")
        return found

    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not a number")

    try:
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        _fail(path, f"the header is not valid JSON: {e}")
    if not isinstance(tree, dict):
        _fail(path, "the header is not a JSON object")
    if b"\\u" in text:
        try:
            json.dumps(tree, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            _fail(path, "the header holds text that is not Unicode (a lone surrogate)")
    data_start = 8 + len(text)
    metadata = tree.pop(_METADATA, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        _fail(path, "__metadata__ must map text to text")
    entries = {name: _entry(path, name, info, data_start) for name, info in tree.items()}
    ordered = dict(sorted(entries.items(), key=lambda kv: (kv[1].start, kv[1].stop)))
    _check_layout(path, ordered, data_start, size)
    return Header(ordered, metadata, data_start, size)


def _entry(path: Path, name: str, info: object, data_start: int) -> Entry:
    if not isinstance(info, dict) or set(info) != _FIELDS:
        _fail(path, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    code, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(code, str):
        _fail(path, f"tensor {name!r} has a dtype that is not text")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        _fail(path, f"tensor {name!r} has a shape or offsets that are not sizes")
    try:
        dtype = _F4 if code == "F4" else dtypes.from_safetensors(code)
    except UnsupportedError as e:
        raise UnsupportedError(f"{path}: tensor {name!r}: {e}") from None
    start, stop = offsets
    need = byte_size(dtype, shape)
    if need is None or need != stop - start:
        _fail(
            path,
            f"tensor {name!r} of {code} {list(shape)[:8]} needs {need} bytes, its offsets "
            f"{start}..{stop} give {stop - start}",
        )
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)


def _are_sizes(values: object) -> bool:
    """Whether this is a list of integers from 0 to 2**63 (JSON booleans are no integers here)."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def byte_size(dtype: np.dtype, shape: Iterable[int]) -> int | None:
    """Return the bytes a tensor takes in the file; None for an odd number of 4-bit elements."""
    count = math.prod(shape)
    if dtype == _F4:
        return None if count % 2 else count // 2
    return count * dtype.itemsize


def _check_layout(path: Path, ordered: Mapping[str, Entry], data_start: int, size: int) -> None:
    """Demand that the entries tile the data section without holes or overlaps, to the last byte."""
    at, last = data_start, "the header"
    for name, entry in ordered.items():
        if entry.start != at:
            kind = "a hole" if entry.start > at else "an overlap"
            _fail(path, f"{kind} between {last!r} and tensor {name!r} at byte {at}")
        at, last = entry.stop, name
    if at > size:
        _fail(path, f"truncated: {at - size} bytes are missing ({size} of {at} are there)")
    if at < size:
        _fail(path, f"{size - at} bytes follow the last tensor; the file is damaged")


def build_header(
    entries: Iterable[tuple[str, np.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[int]]:
    """Return (header bytes with length prefix, absolute file offset of each tensor).

    Args:
        entries: (name, dtype, shape) in the order in which the data will be written.
        metadata: text map for ``__metadata__``; left out when None (``{}`` is written as such).

    Raises:
        FormatError: a name twice or not Unicode, or a header above the format's 100 MB.
        UnsupportedError: an element type that safetensors lacks.
    """
    tree: dict[str, object] = {} if metadata is None else {_METADATA: dict(metadata)}
    offsets: list[int] = []
    at = 0
    for name, dtype, shape in entries:
        if name in tree or name == _METADATA:
            raise FormatError(f"tensor name {name!r} occurs twice or is reserved")
        count = byte_size(dtype, shape)
        if count is None:
            raise UnsupportedError(f"tensor {name!r} has an odd number of 4-bit elements")
        code = "F4" if dtype == _F4 else dtypes.to_safetensors(dtype)
        tree[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + count]}
        offsets.append(at)
        at += count
    try:
        text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as e:
        raise FormatError(f"a tensor name or metadata is not Unicode text: {e.reason}") from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise FormatError(
            f"the header would have {len(text)} bytes, the format allows {MAX_HEADER}"
        )
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [start + o for o in offsets]


def _fail(path: Path, problem: str) -> NoReturn:
    raise FormatError(f"{path}: {problem}")
