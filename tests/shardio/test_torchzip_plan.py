"""Planned torch.save files against torch itself."""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mconv.shardio.box import row_major
from mconv.shardio.stream import Limits, OutFile, write_files
from mconv.shardio.tensor import from_array
from mconv.shardio.torchfile import open_torch_file, read_stored
from mconv.shardio.torchzip_plan import (
    Vector,
    plan_archive,
    plan_item,
    plan_torch_file,
)

torch = pytest.importorskip("torch")

F32 = np.dtype(np.float32)
DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool",
          "uint16", "uint32", "complex64"]  # fmt: skip
NARROW = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]


def write(folder: Path, root: Any, name: str = "model.pt", threads: int = 2) -> Path:
    write_files(folder, [plan_torch_file(name, root)], limits=Limits(threads=threads))
    return folder / name


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5, 7), (2, 3, 4)])
@pytest.mark.parametrize("name", [*DTYPES, *NARROW])
def test_torch_loads_every_type(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name) if name in NARROW else name)
    x = np.arange(prod(shape)).reshape(shape).astype(dtype)
    path = write(tmp_path, {"x": from_array(x)})
    got = torch.load(path, weights_only=True)["x"]
    assert got.dtype == getattr(torch, name)
    assert tuple(got.shape) == shape
    assert got.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == x.tobytes()


def test_layout_of_the_zip(tmp_path: Path) -> None:
    x = np.arange(70, dtype=np.float32)
    path = write(tmp_path, {"a": from_array(x), "b": np.float64(2.0), "c": np.array(3.0)})
    with zipfile.ZipFile(path) as z:
        names = z.namelist()
        assert names[0] == "model/data.pkl"
        assert {"model/byteorder", "model/version", "model/.data/serialization_id"} <= {*names}
        assert z.read("model/byteorder") == b"little"
        assert all(e.compress_type == zipfile.ZIP_STORED for e in z.infolist())
    for storage in open_torch_file(path).storages.values():
        assert storage.offset % 64 == 0
    mapped = torch.load(path, mmap=True, weights_only=True)
    assert torch.equal(mapped["a"], torch.from_numpy(x))


def test_one_object_is_one_storage(tmp_path: Path) -> None:
    x = from_array(np.arange(6, dtype=np.float32))
    got = torch.load(write(tmp_path, {"a": x, "tied": x}), weights_only=True)
    assert got["a"].data_ptr() == got["tied"].data_ptr()


def test_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    x = from_array(np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024))
    piece = x.slice([0]).reshape((-1,)).slice([slice(0, 400)])
    root = {"a": x, "b": x.permute((1, 0)), "v": Vector(F32, 500, ((7, (piece, 0, 400)),))}
    one = write(tmp_path, root, "a/model.pt", 1).read_bytes()
    assert one == write(tmp_path, root, "b/model.pt", 4).read_bytes()


@given(st.data())
def test_vectors_are_their_pieces(data: st.DataObject) -> None:
    import tempfile

    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    x = np.arange(1, prod(shape) + 1, dtype=np.float32).reshape(shape)
    lo = data.draw(st.integers(0, x.size))
    hi = data.draw(st.integers(lo, x.size))
    gap = data.draw(st.integers(0, 9))
    tail = data.draw(st.integers(0, 9))
    pieces = ((gap, (from_array(x), lo, hi)),)
    vector = Vector(F32, gap + hi - lo + tail, pieces)
    expected = np.concatenate([np.zeros(gap), x.reshape(-1)[lo:hi], np.zeros(tail)])
    with tempfile.TemporaryDirectory() as folder:
        got = torch.load(write(Path(folder), [vector]), weights_only=True)[0]
    np.testing.assert_array_equal(got.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (0, 2)])
def test_items_are_archives_of_one_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.full(shape, 2.5, np.float32)
    item = plan_item(from_array(x))
    whole = plan_archive(from_array(x))
    for name, archive in (("item", item), ("whole", whole)):
        write_files(tmp_path, [OutFile(name, archive.size, archive.parts)])
    assert (tmp_path / "item").read_bytes() == (tmp_path / "whole").read_bytes()
    got = torch.load(tmp_path / "item", weights_only=True)
    assert tuple(got.shape) == shape
    np.testing.assert_array_equal(got.numpy(), x)


def test_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sparse: 5 GB that take no space."""
    x = from_array(np.arange(8, dtype=np.float32))
    count = 5 << 28
    path = write(tmp_path, {"big": Vector(F32, count, ((count - 8, (x, 0, x.size)),)), "behind": x})
    got = torch.load(path, mmap=True, weights_only=True)
    assert got["big"].shape == (count,)
    assert got["big"][-9:].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert got["behind"].tolist() == list(range(8))
    ours = open_torch_file(path).root["behind"]
    np.testing.assert_array_equal(read_stored(ours), np.arange(8, dtype=np.float32))


def test_views_of_files_are_written_in_row_major_order(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    lazy = from_array(x).permute((2, 0, 1))
    got = torch.load(write(tmp_path, lazy), weights_only=True)
    np.testing.assert_array_equal(got.numpy(), x.transpose(2, 0, 1))
    assert got.stride() == row_major((4, 2, 3))
