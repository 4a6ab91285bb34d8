"""MindSpore checkpoints, written here by their protobuf definition."""

from __future__ import annotations

import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from mconv.errors import FormatError, MconvError, UnsupportedError
from mconv.shardio.registry import open_checkpoint

KINDS = {"float32": "Float32", "float16": "Float16", "bfloat16": "BFloat16", "int32": "Int32"}


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _value(tag: str, array: np.ndarray, content: bytes | None = None) -> bytes:
    dims = array.shape or (0,)
    inner = b"".join(b"\x08" + _varint(n) for n in dims)
    inner += _field(2, KINDS[array.dtype.name].encode())
    inner += _field(3, array.tobytes() if content is None else content)
    return _field(1, _field(1, tag.encode()) + _field(2, inner))


RNG = np.random.default_rng(2)
ARRAYS = {
    "model.layers.0.attention.wq.weight": RNG.standard_normal((6, 8)).astype(ml_dtypes.bfloat16),
    "model.norm_out.weight": RNG.standard_normal(300).astype(np.float32),
    "moment1.model.norm_out.weight": RNG.standard_normal(300).astype(np.float32),
    "moment2.model.norm_out.weight": RNG.random(300).astype(np.float32),
    "global_step": np.array(12, np.int32),
}


def _file(folder: Path, name: str = "llama-1_12.ckpt", crc: bool = False) -> Path:
    data = b"".join(_value(n, a) for n, a in ARRAYS.items())
    big = RNG.standard_normal((4, 10)).astype(np.float16)
    raw = big.tobytes()
    data += b"".join(_value("big", big, raw[lo : lo + 30]) for lo in range(0, 80, 30))
    (folder / name).write_bytes(data + (b"crc_num" + bytes(10) if crc else b""))
    np.save(folder / "big.npy", big)
    return folder / name


@pytest.mark.parametrize("crc", [False, True])
def test_reads_back(tmp_path: Path, crc: bool) -> None:
    path = _file(tmp_path, crc=crc)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.step, checkpoint.path) == ("mindspore", 12, path)
    names = ["big", "model.layers.0.attention.wq.weight", "model.norm_out.weight"]
    assert sorted(checkpoint.weights) == names
    assert np.array_equal(checkpoint.weights["big"].read(), np.load(tmp_path / "big.npy"))
    for name in names[1:]:
        assert checkpoint.weights[name].read().tobytes() == ARRAYS[name].tobytes()
    moment = checkpoint.optimizer["exp_avg_sq"]["model.norm_out.weight"].read()
    assert np.array_equal(moment, ARRAYS["moment2.model.norm_out.weight"])


@pytest.mark.parametrize("count", [1, 40, 100])
def test_truncated(tmp_path: Path, count: int) -> None:
    path = _file(tmp_path)
    path.write_bytes(path.read_bytes()[:-count])
    with pytest.raises(FormatError, match="truncated"):
        open_checkpoint(path)


def test_a_lost_piece_of_a_big_tensor(tmp_path: Path) -> None:
    path = _file(tmp_path)
    whole = np.load(tmp_path / "big.npy")
    last = _value("big", whole, whole.tobytes()[60:])
    path.write_bytes(path.read_bytes()[: -len(last)])
    with pytest.raises(FormatError, match="its 2 parts have 60"):
        open_checkpoint(path)


def test_rank_files_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank_{rank}").mkdir()
        _file(tmp_path / f"rank_{rank}")
    with pytest.raises(UnsupportedError, match="strategy"):
        open_checkpoint(tmp_path / "rank_0")


def test_mutations_never_crash(tmp_path: Path) -> None:
    path = _file(tmp_path)
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            open_checkpoint(path, format="mindspore")
        except MconvError:
            continue
