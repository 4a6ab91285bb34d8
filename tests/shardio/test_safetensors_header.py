"""safetensors headers: the library as a peer, and everything it refuses refused with a reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mconv.errors import FormatError, MconvError, UnsupportedError
from mconv.shardio import dtypes
from mconv.shardio.safetensors_header import build_header, read_header
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CODES = [
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I32", "I16", "I8", "U64",
    "U32", "U16", "U8", "BOOL", "C64",
]  # fmt: skip


def write(path: Path, tree: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    count = len(text) if length is None else length
    path.write_bytes(count.to_bytes(8, "little") + text + data)
    return path


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("code", CODES)
def test_reads_what_the_library_writes(tmp_path: Path, code: str) -> None:
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("safetensors.torch")
    dtype = dtypes.from_safetensors(code)
    data = bytes(i % 2 for i in range(24 * dtype.itemsize))
    kind = getattr(torch, dtypes.name(dtype))
    tensors = {
        "b": torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind).reshape(2, 12),
        "a": torch.tensor(5, dtype=torch.int8),
        "none": torch.zeros(0, 3),
    }
    path = tmp_path / "x.safetensors"
    peer.save_file(tensors, path, {"format": "pt"})
    raw = path.read_bytes()
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == len(raw)
    entry = header.tensors["b"]
    assert (entry.dtype, entry.shape) == (dtype, (2, 12))
    assert raw[entry.start : entry.stop] == data
    assert header.tensors["a"].shape == ()
    assert header.tensors["none"].start == header.tensors["none"].stop


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "é": 'q"\\\n\x01\x7f€😀'}])
def test_writes_the_same_bytes_as_the_library(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    arrays = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "näme": np.ones((3,), np.uint8),
        "deep.er": np.zeros((0, 4), np.int64),
        "s": np.array(1.5),
    }
    path = tmp_path / "x.safetensors"
    if metadata and len(metadata) > 1:  # the library orders several keys at random
        metadata = {"é": metadata["é"]}
    save_file(arrays, path, metadata)
    header = read_header(path)
    raw, offsets = build_header(
        [(n, e.dtype, e.shape) for n, e in header.tensors.items()], metadata
    )
    assert raw == path.read_bytes()[: header.data_start]
    assert offsets == [e.start for e in header.tensors.values()]


def test_round_trip_of_every_dtype_in_the_callers_order(tmp_path: Path) -> None:
    f4 = np.dtype(ml_dtypes.float4_e2m1fn)
    entries = [(c, dtypes.from_safetensors(c), (3, 2)) for c in reversed(CODES)]
    entries.append(("F4", f4, (3, 2)))
    raw, offsets = build_header(entries, {"k": "v"})
    assert len(raw) % 8 == 0
    sizes = [6 * d.itemsize for _, d, _ in entries[:-1]] + [3]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw + bytes(sum(sizes)))
    header = read_header(path)
    assert [(n, e.dtype, e.shape) for n, e in header.tensors.items()] == entries
    assert [e.start for e in header.tensors.values()] == offsets
    assert [e.stop - e.start for e in header.tensors.values()] == sizes
    with safe_open(path, "np") as peer:
        assert set(peer.keys()) == set(header.tensors)


def test_empty_file_of_no_tensors(tmp_path: Path) -> None:
    raw, offsets = build_header([], None)
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    assert offsets == []
    assert read_header(path).tensors == {}


ATTACKS: dict[str, tuple[Any, bytes, str]] = {
    "hole": ({"a": tensor(), "b": tensor(offsets=[9, 17])}, bytes(17), "a hole between 'a'"),
    "hole at start": ({"a": tensor(offsets=[1, 9])}, bytes(9), "a hole between 'the header'"),
    "overlap": ({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12), "an overlap"),
    "same bytes twice": ({"a": tensor(), "b": tensor()}, bytes(8), "an overlap"),
    "truncated": ({"a": tensor()}, bytes(5), "truncated: 3 bytes are missing"),
    "trailing": ({"a": tensor()}, bytes(9), "1 bytes follow the last tensor"),
    "size": ({"a": tensor(shape=[3])}, bytes(8), r"needs 12 bytes, its offsets 0\.\.8 give 8"),
    "reversed": ({"a": tensor(shape=[0], offsets=[8, 0])}, bytes(8), "needs 0 bytes"),
    "negative": ({"a": tensor(offsets=[-8, 0])}, bytes(8), "not sizes"),
    "float": ({"a": tensor(offsets=[0, 8.0])}, bytes(8), "not sizes"),
    "bool": ({"a": tensor(dtype="U8", shape=[True], offsets=[0, 1])}, bytes(1), "not sizes"),
    "text offset": ({"a": tensor(offsets=["0", 8])}, bytes(8), "not sizes"),
    "three offsets": ({"a": tensor(offsets=[0, 4, 8])}, bytes(8), "not sizes"),
    "huge dims": ({"a": tensor(shape=[2**62, 2**62, 0, 2**62])}, bytes(8), "needs 0 bytes"),
    "product overflow": ({"a": tensor(shape=[2**32, 2**32, 2**32])}, bytes(8), "give 8"),
    "above 63 bits": ({"a": tensor(shape=[2**64])}, bytes(8), "not sizes"),
    "nan": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"", "NaN is not"),
    "infinity": (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', b"", "JSON"),
    "huge digits": (b'{"a":' + b"9" * 10_000 + b"}", b"", "valid JSON|needs exactly"),
    "twice": (b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2), bytes(8), "twice"),
    "twice inside": (b'{"a":{"dtype":"F32","dtype":"F32"}}', b"", "twice"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "valid JSON"),
    "no object": (b"[1]     ", b"", "does not start with"),
    "space first": (b" {}", b"", "does not start with"),
    "not closed": (b'{"a":', b"", "valid JSON"),
    "text behind": (b"{} x", b"", "valid JSON"),
    "bad utf8": (b'{"\xff":1}', b"", "valid JSON"),
    "surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"", "Unicode"),
    "metadata list": ({"__metadata__": []}, b"", "text to text"),
    "metadata number": ({"__metadata__": {"a": 1}}, b"", "text to text"),
    "extra field": ({"a": {**tensor(), "x": 1}}, bytes(8), "needs exactly"),
    "missing field": ({"a": {"dtype": "F32"}}, b"", "needs exactly"),
    "tensor is text": ({"a": "F32"}, b"", "needs exactly"),
    "dtype is number": ({"a": tensor(dtype=1)}, bytes(8), "not text"),
    "half of a byte": ({"a": tensor("F4", [3], [0, 2])}, bytes(2), "needs None bytes|odd"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_and_named(tmp_path: Path, name: str) -> None:
    tree, data, message = ATTACKS[name]
    path = write(tmp_path / "x.safetensors", tree, data)
    with pytest.raises(FormatError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes, too few"),
        (b"\x00" * 7, "7 bytes, too few"),
        (b"\xff" * 64, "limit 100000000"),
        ((2**26).to_bytes(8, "little") + b"{}", "truncated: the header needs 67108872 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (bytes(64), "does not start with"),
    ],
)
def test_other_files(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=message):
        read_header(path)


def test_missing_file_and_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_header(tmp_path / "absent")
    path = write(tmp_path / "x.safetensors", {"a": tensor(dtype="Q9")}, bytes(8))
    with pytest.raises(UnsupportedError, match=r"tensor 'a'.*Q9"):
        read_header(path)


def test_writing_refuses_what_cannot_be_read() -> None:
    f32 = np.dtype(np.float32)
    for names in (["a", "a"], ["__metadata__"], ["\ud800"]):
        with pytest.raises(FormatError):
            build_header([(n, f32, (1,)) for n in names], {"x": "y"})
    with pytest.raises(UnsupportedError):
        build_header([("a", np.dtype("U3"), (1,))], None)
    with pytest.raises(UnsupportedError, match="odd"):
        build_header([("a", np.dtype(ml_dtypes.float4_e2m1fn), (3,))], None)


def test_mutants_are_refused_whenever_the_library_refuses_them(tmp_path: Path) -> None:
    rng = random.Random(7)
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(4, np.float32), "b": np.ones((2, 2), np.int8)}, path, {"k": "v"})
    whole = path.read_bytes()
    refused = 0
    for _ in range(500):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw) - 16)
            raw[at] = rng.choice(b'0123456789[]{}",:aFIU8_ \x00\xff')
        if rng.random() < 0.2:
            del raw[rng.randrange(len(raw)) :]
        path.write_bytes(raw)
        try:
            with safe_open(path, "np") as peer:
                expected = {k: tuple(peer.get_slice(k).get_shape()) for k in peer.keys()}  # noqa: SIM118
        except (SafetensorError, FileNotFoundError, OSError):
            expected = None
        try:
            got = {k: e.shape for k, e in read_header(path).tensors.items()}
        except MconvError:
            refused += 1
            continue
        assert got == expected
    assert 100 < refused < 500


def test_fixtures(fixtures_dir: Path) -> None:
    files = sorted(fixtures_dir.rglob("*.safetensors"))
    assert files
    for path in files:
        header = read_header(path)
        with safe_open(path, "np") as peer:
            assert set(peer.keys()) == set(header.tensors)
            assert (peer.metadata() or {}) == header.metadata
