"""MindSpore ``.ckpt``: a protobuf list of named tensors, read by skipping over their contents.

``Checkpoint{repeated Value{1: tag, 2: TensorProto{1: dims, 2: type, 3: content}}}``; tensors above
512 MB are several values of one tag, each with the whole dims; an optional checksum ends the file.
Files of several ranks do not say how they are cut and are refused. Source: MindSpore
``checkpoint.proto``, ``train/serialization.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from ...errors import FormatError, UnsupportedError
from ..checkpoint import Checkpoint
from ..chunked import Chunked
from ..coverage import prove
from ..flat_buffer import Run, from_runs
from ..layout import Layout
from ..protobuf import signed, varint
from ..registry import Format, OpenOptions
from ..source import FileSource, open_file
from ..state_checkpoint import model_files
from ..tensor import LazyTensor

_WINDOW = 4096  # bytes that hold the tag, dims and type of a value
_CRC = b"crc_num"
_CRC_SIZE = len(_CRC) + 10
_RANK = re.compile(r"^rank_(\d+)$")
_DTYPES: dict[str, np.dtype] = {
    "Float16": np.dtype("<f2"), "Float32": np.dtype("<f4"), "Float64": np.dtype("<f8"),
    "BFloat16": np.dtype(ml_dtypes.bfloat16), "Int8": np.dtype("i1"), "Int16": np.dtype("<i2"),
    "Int32": np.dtype("<i4"), "Int64": np.dtype("<i8"), "UInt8": np.dtype("u1"),
    "UInt16": np.dtype("<u2"), "UInt32": np.dtype("<u4"), "UInt64": np.dtype("<u8"),
    "Bool": np.dtype("?"),
}  # fmt: skip
_MOMENTS = {"moment1.": "exp_avg", "moment2.": "exp_avg_sq", "moments1.": "exp_avg",
            "moments2.": "exp_avg_sq", "adam_m.": "exp_avg", "adam_v.": "exp_avg_sq",
            "exp_avg.": "exp_avg", "exp_avg_sq.": "exp_avg_sq"}  # fmt: skip
_COUNTERS = ("global_step", "step_num", "step")
_SETTINGS = (*_COUNTERS, "epoch_num", "learning_rate", "beta1_power", "beta2_power", "scale_sense",
             "loss_scale", "current_iterator_step", "last_overflow_iterator_step", "current_step_",
             "weight_decay")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Value:
    """One message: tag, shape, type, and where its content lies."""

    tag: str
    dims: tuple[int, ...]
    kind: str
    offset: int
    size: int


def detect(path: Path) -> Path | None:
    """Return the file, or the only one of a folder."""
    if path.is_file():
        return path if _is_mindspore(path) else None
    found = [p for p in sorted(path.glob("*.ckpt")) if _is_mindspore(p)]
    return found[0] if len(found) == 1 else None


def _is_mindspore(path: Path) -> bool:
    if path.suffix != ".ckpt":
        return False
    try:
        with open_file(path) as file:
            value = _value(file, *_head(file, 0, path.stat().st_size))
    except (OSError, ValueError):
        return False
    return bool(value.tag) and value.kind in _DTYPES


def open_mindspore(root: Path, options: OpenOptions) -> Checkpoint:
    """Open one file.

    Raises:
        FormatError: damaged, truncated or encrypted files, contents that do not fit the shapes.
        UnsupportedError: one of several ranks' files, unknown element types.
    """
    rank = _RANK.match(root.resolve().parent.name)
    if rank and any(root.resolve().parent.parent.glob("rank_[1-9]*")):
        raise UnsupportedError(
            f"{root}: is one rank's part; how its tensors are cut is in MindSpore's strategy file: "
            "join them with mindspore.unified_safetensors or merge_sliced_parameter first"
        )
    source = FileSource.of(root)
    tensors = dict(_tensors(source))
    optimizer: dict[str, dict[str, LazyTensor]] = {}
    weights: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in _MOMENTS if name.startswith(p)), "")
        owner = name[len(prefix) :]
        if prefix and owner in tensors:
            optimizer.setdefault(_MOMENTS[prefix], {})[owner] = tensor
        elif name not in _SETTINGS:
            weights[name] = tensor
    if not weights:
        raise FormatError(f"{root}: holds no tensors that could be model weights")
    prove(weights, root)
    for state, states in optimizer.items():
        prove(states, f"{root}: optimizer state {state}")
    config, assets = model_files(root, options)
    counter = next((tensors[n] for n in _COUNTERS if n in tensors and tensors[n].size == 1), None)
    return Checkpoint(
        path=root,
        format="mindspore",
        naming="mindspore",
        weights=weights,
        optimizer=optimizer,
        step=None if counter is None else int(counter.read().reshape(-1)[0]),
        config=config,
        layout=Layout(format="mindspore"),
        assets=assets,
    )


def _tensors(source: FileSource) -> Iterator[tuple[str, LazyTensor]]:
    """Join values of one tag."""
    groups: dict[str, list[_Value]] = {}
    try:
        for value in _values(source):
            groups.setdefault(value.tag, []).append(value)
    except ValueError as e:
        raise FormatError(f"{source.path}: damaged, truncated or encrypted ({e})") from e
    for tag, values in groups.items():
        first = values[0]
        dtype = _DTYPES.get(first.kind)
        if dtype is None:
            raise UnsupportedError(f"{source.path}: {tag!r} has the type {first.kind!r}")
        total = sum(v.size for v in values)
        scalar = first.dims == (0,) and total == dtype.itemsize
        shape = () if scalar else first.dims
        alike = all((v.dims, v.kind) == (first.dims, first.kind) for v in values)
        aligned = all(v.size % dtype.itemsize == 0 for v in values)
        if not alike or not aligned or total != prod(shape) * dtype.itemsize:
            raise FormatError(
                f"{source.path}: {tag!r} {list(shape)} of {first.kind} needs "
                f"{prod(shape) * dtype.itemsize} bytes, its {len(values)} parts have {total}"
            )
        if len(values) == 1:
            yield tag, Chunked.contiguous(source, first.offset, shape, dtype)
            continue
        yield tag, from_runs(shape, dtype, partial(_runs, source, values, dtype.itemsize))


def _runs(source: FileSource, values: list[_Value], itemsize: int) -> list[Run]:
    return [(source, v.offset, v.size // itemsize) for v in values]


def _values(source: FileSource) -> Iterator[_Value]:
    with source.path.open("rb") as file:
        end = source.size
        if end >= _CRC_SIZE:
            file.seek(end - _CRC_SIZE)
            end -= _CRC_SIZE if file.read(len(_CRC)) == _CRC else 0
        at = 0
        while at < end:
            start, stop = _head(file, at, end)
            yield _value(file, start, stop)
            at = stop


def _head(file: BinaryIO, at: int, end: int) -> tuple[int, int]:
    """Return where the Value at ``at`` starts and ends."""
    file.seek(at)
    window = file.read(16)
    if window[:1] != b"\x0a":
        raise ValueError(f"no value at byte {at}")
    size, skip = varint(window, 1)
    if at + skip + size > end:
        raise ValueError(f"the value at byte {at} has {size} bytes, {end - at - skip} are there")
    return at + skip, at + skip + size


def _value(file: BinaryIO, start: int, stop: int) -> _Value:
    """Parse a Value without reading the content, which is its last field."""
    file.seek(start)
    window = file.read(min(_WINDOW, stop - start))
    tag, at = _text(window, 0, 0x0A)
    if window[at : at + 1] != b"\x12":
        raise ValueError(f"{tag!r} is no tensor")
    size, at = varint(window, at + 1)
    if start + at + size != stop:
        raise ValueError(f"{tag!r} has {size} bytes of tensor, {stop - start - at} are there")
    dims: list[int] = []
    kind = ""
    while at < len(window):
        field = window[at]
        if field == 0x08:
            number, at = varint(window, at + 1)
            dims.append(signed(number))
        elif field == 0x0A:  # packed dims
            length, inner = varint(window, at + 1)
            at = inner
            while at < inner + length:
                number, at = varint(window, at)
                dims.append(signed(number))
        elif field == 0x12:
            kind, at = _text(window, at, 0x12)
        elif field == 0x1A:
            length, at = varint(window, at + 1)
            if start + at + length != stop:
                raise ValueError(f"the content of {tag!r} does not end with its value")
            if any(not 0 <= n < 2**48 for n in dims):
                raise ValueError(f"{tag!r} has dims {dims}")
            return _Value(tag, tuple(dims), kind, start + at, length)
        else:
            raise ValueError(f"{tag!r} has an unknown field {field}")
    raise ValueError(f"{tag!r} has no content")


def _text(data: bytes, at: int, field: int) -> tuple[str, int]:
    if data[at : at + 1] != bytes([field]):
        raise ValueError("a text is missing")
    size, at = varint(data, at + 1)
    if at + size > len(data):
        raise ValueError("a text is cut off")
    return data[at : at + size].decode("utf-8"), at + size


FORMAT = Format("mindspore", "MindSpore .ckpt", detect, open_mindspore, rank=60)
