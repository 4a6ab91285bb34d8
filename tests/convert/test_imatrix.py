"""Importance matrices: both formats, experts, selection, and every way they can be wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from mconv.convert.gguf.values import string, strings, u32
from mconv.convert.imatrix import read_imatrix
from mconv.errors import ConfigError, FormatError

from .tiny_gguf import MODELS, importance, write_dat, write_gguf, write_imatrix, write_model

MOE = MODELS["moe"]
EXPERTS = "blk.0.ffn_up_exps.weight"
QUERY = "blk.0.attn_q.weight"


def test_gguf_divides_by_the_counts_of_each_expert(tmp_path: Path) -> None:
    matrix = read_imatrix(write_imatrix(tmp_path / "i.gguf", MOE))
    truth = importance(MOE)
    assert set(matrix.entries) == set(truth)
    assert (matrix.datasets, matrix.chunks) == (("wiki.train.raw", "more.txt"), 7)
    sums, counts = truth[EXPERTS]
    got = matrix.weights(EXPERTS, (4, 8, 256))
    assert got is not None
    np.testing.assert_array_equal(got[:3], sums[:3] / counts[:3, None])
    np.testing.assert_array_equal(got[3], np.ones(256))  # no token saw this expert
    assert matrix.weights("blk.0.attn_norm.weight", (256,)) is None


@pytest.mark.parametrize("trailer", [True, False])
def test_dat(tmp_path: Path, trailer: bool) -> None:
    matrix = read_imatrix(write_dat(tmp_path / "i.dat", MOE, trailer=trailer))
    sums, _ = importance(MOE)[QUERY]
    np.testing.assert_array_equal(matrix.entries[QUERY], sums.reshape(-1) / np.float32(5))
    assert (matrix.datasets, matrix.chunks) == ((("wiki.raw",), 9) if trailer else ((), 0))


def test_selection(tmp_path: Path) -> None:
    matrix = read_imatrix(write_imatrix(tmp_path / "i.gguf", MOE))
    assert len(matrix.selected(include=["ffn_up"]).entries) == MOE.layers
    assert EXPERTS not in matrix.selected(exclude=["ffn_up"])
    assert matrix.selected() == matrix
    with pytest.raises(ConfigError, match="exclude each other"):
        matrix.selected(["a"], ["b"])
    with pytest.raises(ConfigError, match=r"contains 'ffm_up'; it has \d+ entries, such as blk"):
        matrix.selected(["ffm_up"])


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        (QUERY, (8, 512), "256 values.*512 columns.*made for another model"),
        (EXPERTS, (8, 8, 256), "8 matrices of 256 columns.*it is for 4 experts"),
        (QUERY, (4, 8, 256), "without telling experts apart"),
    ],
)
def test_mismatch_is_explained(
    tmp_path: Path, name: str, shape: tuple[int, ...], problem: str
) -> None:
    matrix = read_imatrix(write_imatrix(tmp_path / "i.gguf", MOE))
    with pytest.raises(FormatError, match=problem):
        matrix.weights(name, shape)


def test_foreign_matrix_is_told(tmp_path: Path) -> None:
    matrix = read_imatrix(write_imatrix(tmp_path / "i.gguf", MOE))
    assert matrix.mismatch([QUERY]) is None
    assert "made for another model" in (matrix.mismatch(["model.layers.0"]) or "")


def test_a_model_is_not_a_matrix(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", MODELS["odd"])
    with pytest.raises(FormatError, match="not an importance matrix"):
        read_imatrix(path)


def broken_gguf(tmp_path: Path, **tensors: np.ndarray) -> Path:
    entries = [
        string("general.type", "imatrix"),
        strings("imatrix.datasets", ["x"]),
        u32("imatrix.chunk_count", 1),
        u32("imatrix.chunk_size", 512),
    ]
    return write_gguf(
        tmp_path / "b.gguf", entries, {k.replace("__", "."): v for k, v in tensors.items()}
    )


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"a__in_sum2": np.ones((1, 8), np.float32)}, "but not both"),
        ({"a__in_sum2": np.ones((1, 8), np.float32), "a__counts": np.ones((3, 1), np.float32)},
         "8 sums for 3 counts"),
        ({"a__in_sum2": np.full((1, 8), np.nan, np.float32),
          "a__counts": np.ones((1, 1), np.float32)}, "not finite"),
        ({"a__in_sum2": np.full((1, 8), -1, np.float32),
          "a__counts": np.ones((1, 1), np.float32)}, "negative"),
        ({"other": np.ones((1, 8), np.float32)}, "no importance data"),
    ],
)  # fmt: skip
def test_broken_gguf(tmp_path: Path, tensors: dict[str, np.ndarray], problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        read_imatrix(broken_gguf(tmp_path, **tensors))


def test_gguf_without_its_keys(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "k.gguf", [string("general.type", "imatrix")], {})
    with pytest.raises(FormatError, match=r"lacks imatrix\.datasets"):
        read_imatrix(path)


@pytest.mark.parametrize("keep", [2, 4, 9, 40, 5000])
def test_truncated_dat(tmp_path: Path, keep: int) -> None:
    path = write_dat(tmp_path / "i.dat", MOE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"i\.dat"):
        read_imatrix(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello world, this is text",
        struct.pack("<i", -1),
        struct.pack("<ii", 1, 1 << 30) + bytes(20),
        struct.pack("<ii1sii", 1, 1, b"a", 1, 0) + bytes(4),
        struct.pack("<ii1sii", 1, -1, b"a", 1, 1) + bytes(4),
    ],
)
def test_foreign_dat(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.dat").write_bytes(data)
    with pytest.raises(FormatError):
        read_imatrix(tmp_path / "x.dat")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_imatrix(tmp_path / "none.gguf")
