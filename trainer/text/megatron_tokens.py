"""Megatron's token files, ``NAME.bin`` with ``NAME.idx``, as they are.

Format: Megatron-Core ``datasets/indexed_dataset.py``: magic, version, type code, counts, then the
lengths (int32) and byte offsets (int64) of sequences, and the first sequence of each document
(int64, with one more at the end). Everything is little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from ...errors import FormatError

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<QBQQ")
_TYPES = {4: "<u4", 8: "<u2"}  # int32 (ids are never negative) and uint16


def read_index(path: Path, nbytes: int) -> tuple[np.dtype, np.ndarray]:
    """Return the type of the tokens, and where documents start (int64, in tokens).

    Args:
        path: the ``.idx`` file.
        nbytes: size of the ``.bin`` file.

    Raises:
        FormatError: not such a file, or one that does not fit the ``.bin``.
    """
    data = path.read_bytes()
    if not data.startswith(_MAGIC) or len(data) < len(_MAGIC) + _HEAD.size:
        raise FormatError(f"{path}: not an index of Megatron's indexed dataset")
    version, code, sequences, documents = _HEAD.unpack_from(data, len(_MAGIC))
    if version != 1 or code not in _TYPES:
        raise FormatError(
            f"{path}: version {version}, type {code}; known are version 1 with int32 (4) or "
            "uint16 (8)"
        )
    at = len(_MAGIC) + _HEAD.size
    if len(data) - at < 12 * sequences + 8 * documents:
        raise FormatError(f"{path}: is cut off: {sequences} sequences, {documents} documents")
    kind = np.dtype(_TYPES[code])
    lengths = np.frombuffer(data, "<i4", sequences, at).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", sequences, at + 4 * sequences)
    firsts = np.frombuffer(data, "<i8", documents, at + 12 * sequences)
    ends = np.cumsum(lengths) * kind.itemsize
    if not np.array_equal(offsets[1:], ends[:-1]) or (ends[-1:] != nbytes).any():
        raise FormatError(f"{path}: its sequences are not those of the .bin, of {nbytes} bytes")
    inside = firsts[firsts < sequences]
    if (inside < 0).any() or (np.diff(firsts) < 0).any():
        raise FormatError(f"{path}: documents out of order")
    starts = np.unique(offsets[inside]) // kind.itemsize
    return kind, starts[starts < nbytes // kind.itemsize]
