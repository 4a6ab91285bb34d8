"""A writer of TensorBundles (TensorFlow's checkpoint files), by their definition: one data file,
one
block of keys.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
from mconv.shardio.crc32c import crc32c, masked

_TYPES = {np.dtype("f4"): 1, np.dtype("i4"): 3, np.dtype("i8"): 9,
          np.dtype(ml_dtypes.bfloat16): 14}  # fmt: skip
_MAGIC = 0xDB4775248B80FB57


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _varint(value)


def _bytes(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _block(items: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(_varint(0) + _varint(len(k)) + _varint(len(v)) + k + v for k, v in items)
    body += (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + b"\0"
    return body + masked(crc32c(body)).to_bytes(4, "little")


def write_bundle(prefix: Path, arrays: dict[str, np.ndarray], graph: bytes = b"") -> Path:
    """Write ``prefix.index`` and its data file; ``graph``: a serialized object graph."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    data = b""
    entries = {b"": _number(1, 1) + _bytes(3, _number(1, 1))}
    if graph:
        string = _varint(len(graph)) + masked(crc32c(_length(graph))).to_bytes(4, "little") + graph
        entries[b"_CHECKPOINTABLE_OBJECT_GRAPH"] = (
            _number(1, 7) + _bytes(2, b"") + _number(5, len(string)) + _crc(string)
        )
        data += string
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        dims = b"".join(_bytes(2, _number(1, n)) for n in array.shape)
        entries[name.encode()] = (
            _number(1, _TYPES[array.dtype]) + _bytes(2, dims) + _number(4, len(data))
            + _number(5, len(raw)) + _crc(raw)
        )  # fmt: skip
        data += raw
    block = _block(sorted(entries.items()))
    size = len(block) - 5
    index = _block([(b"\xff", _varint(0) + _varint(size))])
    meta = _block([])
    handles = _varint(len(block)) + _varint(len(meta) - 5)
    handles += _varint(len(block) + len(meta)) + _varint(len(index) - 5)
    footer = handles.ljust(40, b"\0") + _MAGIC.to_bytes(8, "little")
    prefix.with_name(f"{prefix.name}.index").write_bytes(block + meta + index + footer)
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    return prefix.with_name(f"{prefix.name}.index")


def _crc(raw: bytes) -> bytes:
    return bytes([6 << 3 | 5]) + masked(crc32c(raw)).to_bytes(4, "little")


def _length(raw: bytes) -> bytes:
    return len(raw).to_bytes(4, "little")


def object_graph(names: dict[str, str]) -> bytes:
    """A graph of a root with one node per variable: {checkpoint key: TensorFlow's own name}."""
    holder = _bytes(1, _number(1, 1) + _bytes(2, b"model"))
    nodes = [
        holder,
        b"".join(
            _bytes(1, _number(1, i + 2) + _bytes(2, f"v{i}".encode())) for i in range(len(names))
        ),
    ]
    for key, full in names.items():
        attribute = (
            _bytes(1, b"VARIABLE_VALUE") + _bytes(2, full.encode()) + _bytes(3, key.encode())
        )
        nodes.append(_bytes(2, attribute))
    return b"".join(_bytes(1, n) for n in nodes)
