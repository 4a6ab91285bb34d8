"""Flax's MessagePack files, packed here by the specification: whole models and EasyLM's streams."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mconv.errors import FormatError, MconvError
from mconv.shardio.registry import open_checkpoint

RNG = np.random.default_rng(3)
TREE: dict[str, Any] = {
    "model": {"layers": {str(i): {"self_attn": {"q_proj": {
        "kernel": RNG.standard_normal((6, 8)).astype(np.float32)}}} for i in range(20)}},
    "norm": {"weight": RNG.standard_normal(300).astype(ml_dtypes.bfloat16)},
    "count": {"x": np.array(3, np.int32)},
}  # fmt: skip


def pack(value: Any) -> bytes:
    """MessagePack of what flax writes."""
    if isinstance(value, dict):
        head = (
            bytes([0x80 | len(value)]) if len(value) < 16 else struct.pack(">BH", 0xDE, len(value))
        )
        return head + b"".join(pack(k) + pack(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return bytes([0x90 | len(value)]) + b"".join(pack(v) for v in value)
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if value < 128 else struct.pack(">BI", 0xCE, value)
    if isinstance(value, str):
        return bytes([0xA0 | len(value)]) + value.encode() if len(value) < 32 else (
            struct.pack(">BB", 0xD9, len(value)) + value.encode())  # fmt: skip
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    body = pack([list(value.shape), value.dtype.name, value.tobytes()])
    return struct.pack(">BIB", 0xC9, len(body), 1) + body


def _flat(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], np.ndarray]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, sub in tree.items() for k, v in _flat(sub, (*path, key)).items()}


def _equal(path: Path) -> None:
    opened = open_checkpoint(path)
    assert (opened.format, opened.naming) == ("flax_msgpack", "hf_flax")
    want = _flat(TREE)
    assert set(opened.weights) == {".".join(k) for k in want}
    for key, array in want.items():
        assert opened.weights[".".join(key)].read().tobytes() == array.tobytes()


def test_flax(tmp_path: Path) -> None:
    (tmp_path / "flax_model.msgpack").write_bytes(pack(TREE))
    _equal(tmp_path)


def test_stream(tmp_path: Path) -> None:
    data = b"".join(pack([list(k), pack(v)]) for k, v in _flat(TREE).items())
    (tmp_path / "streaming_params_7").write_bytes(data)
    _equal(tmp_path / "streaming_params_7")


def test_chunked_array(tmp_path: Path) -> None:
    array = RNG.standard_normal((5, 4)).astype(np.float32)
    pieces = {str(i): p for i, p in enumerate(np.split(array.reshape(-1), [7, 14]))}
    value = {"__msgpack_chunked_array__": True, "shape": {"0": 5, "1": 4}, "chunks": pieces}
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(pack({"big": {"kernel": value}}))
    assert np.array_equal(open_checkpoint(path).weights["big.kernel"].read(), array)
    value["shape"] = {"0": 5, "1": 5}
    path.write_bytes(pack({"big": {"kernel": value}}))
    with pytest.raises(FormatError, match="chunks"):
        open_checkpoint(path)


@pytest.mark.parametrize("count", [1, 40, 400])
def test_truncated(tmp_path: Path, count: int) -> None:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(pack(TREE)[:-count])
    with pytest.raises(FormatError, match="truncated"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "data",
    [b"\x81" * 5000, b"\xdf\xff\xff\xff\xff", b"\x81\xa1a\xdd\xff\xff\xff\xff",
     b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", b"\x92\x01\x02"],
)  # fmt: skip
def test_hostile(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        open_checkpoint(path)


def test_mutations_never_crash(tmp_path: Path) -> None:
    path = tmp_path / "flax_model.msgpack"
    whole = pack(TREE)
    rng = random.Random(2)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            open_checkpoint(path, format="flax_msgpack")
        except MconvError:
            continue
