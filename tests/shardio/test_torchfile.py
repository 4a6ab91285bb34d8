"""torch.save files: bit-exact against torch.load, and lazy."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.errors import FormatError, UnsupportedError
from mconv.shardio import dtypes, torchzip
from mconv.shardio.records import Global, Record, StoredTensor, exotic_kind, walk_tensors
from mconv.shardio.torchfile import open_torch_file, read_stored
from mconv.shardio.unpickle import loads

from .pickle_code import call, num, stop, text, tup

torch = pytest.importorskip("torch")
LEGACY = {"_use_new_zipfile_serialization": False}


def save(obj: object, path: Path, legacy: bool = False, **kwargs: Any) -> Path:
    torch.save(obj, path, **(LEGACY if legacy else {}), **kwargs)
    return path


def raw_bytes(tensor: Any) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(stored: object, tensor: Any) -> None:
    assert isinstance(stored, StoredTensor)
    got = read_stored(stored)
    assert got.shape == tuple(tensor.shape)
    assert dtypes.name(got.dtype) == str(tensor.dtype).removeprefix("torch.")
    assert got.tobytes() == raw_bytes(tensor)


DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32",
    "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128",
]  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(tmp_path: Path, name: str, legacy: bool) -> None:
    dtype = getattr(torch, name)
    raw = torch.arange(48, dtype=torch.uint8) % 2
    tensor = raw.repeat(dtype.itemsize).view(dtype).reshape(2, -1)
    f = open_torch_file(save({"w": tensor, "s": tensor[1, 1]}, tmp_path / "x.pt", legacy))
    assert f.kind == ("legacy" if legacy else "zip")
    assert isinstance(f.root, dict)
    assert_same(f.root["w"], tensor)
    assert_same(f.root["s"], tensor[1, 1])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_views_and_shared_storages(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    views = {
        "base": base,
        "row": base[3],
        "column": base[:, 7],
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "permuted": base.reshape(5, 3, 4).permute(2, 0, 1),
        "expanded": base[2:3].expand(4, 12),
        "empty": base[:0],
        "scalar": torch.tensor(3.5),
        "other": torch.ones(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(base[:2]),
        "again": base,
    }
    f = open_torch_file(save(views, tmp_path / "x.pt", legacy))
    assert isinstance(f.root, dict)
    for name, tensor in views.items():
        assert_same(f.root[name], tensor)
    keys = {name: t.storage.key for name, t in f.root.items()}
    assert len({keys[n] for n in views if n not in ("scalar", "other")}) == 1
    assert f.root["base"] is f.root["again"]
    assert f.root["base"].contiguous
    assert not f.root["transposed"].contiguous
    assert f.root["row"].storage_offset == 36
    assert len(f.storages) == 3


def test_modules_buffers_and_optimizers(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    f = open_torch_file(save(state, tmp_path / "x.pt"))
    found = dict(walk_tensors(f.root))
    for name, tensor in model.state_dict().items():
        assert_same(found["model", name], tensor)
    for index, entry in optimizer.state_dict()["state"].items():
        assert_same(found["optimizer", "state", index, "exp_avg"], entry["exp_avg"])
    whole = open_torch_file(save(model, tmp_path / "module.pt"))
    paths = [path for path, _ in walk_tensors(whole.root)]
    assert ("_modules", "0", "_parameters", "weight") in paths


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_reading_the_structure_reads_no_tensor(
    tmp_path: Path, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save({f"w{i}": torch.zeros(1 << 20) for i in range(4)}, tmp_path / "x.pt", legacy)
    total = 0
    pread = os.pread

    def counting(fd: int, count: int, offset: int) -> bytes:
        nonlocal total
        data = pread(fd, count, offset)
        total += len(data)
        return data

    monkeypatch.setattr(torchzip.os, "pread", counting)
    f = open_torch_file(path)
    assert len(list(walk_tensors(f.root))) == 4
    assert total < 1_000_000 < path.stat().st_size


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("shift", [1, 2, 3, 4097])
def test_embedded_at_any_offset(tmp_path: Path, shift: int, legacy: bool) -> None:
    tensor = torch.arange(100, dtype=torch.float64)
    inner = save({"w": tensor}, tmp_path / "x.pt", legacy).read_bytes()
    path = tmp_path / "outer.bin"
    path.write_bytes(b"\x55" * shift + inner + b"PK\x05\x06" + bytes(50))
    f = open_torch_file(path, shift, len(inner))
    assert isinstance(f.root, dict)
    assert_same(f.root["w"], tensor)
    with pytest.raises(FormatError, match=r"outer\.bin"):
        open_torch_file(path, shift, len(inner) - 1)
    with pytest.raises(FormatError, match="are needed"):
        open_torch_file(path, shift, len(inner) + 1000)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickle_protocols(tmp_path: Path, protocol: int, legacy: bool) -> None:
    tensor = torch.arange(3.0)
    f = open_torch_file(save([tensor], tmp_path / "x.pt", legacy, pickle_protocol=protocol))
    assert isinstance(f.root, list)
    assert_same(f.root[0], tensor)


def test_large_legacy_pickles_grow_the_window(tmp_path: Path) -> None:
    state = {f"layer.{i}.weight": torch.full((2,), float(i)) for i in range(3000)}
    f = open_torch_file(save(state, tmp_path / "x.pt", legacy=True))
    assert isinstance(f.root, dict)
    assert_same(f.root["layer.2999.weight"], state["layer.2999.weight"])


def test_legacy_storage_views(tmp_path: Path) -> None:
    """Persistent ids with a view (root key, offset, size), as torch wrote before 0.4."""
    data = np.arange(10, dtype="<f4").tobytes()
    pid = tup(
        text("storage"), b"ctorch\nFloatStorage\n", text("7"), text("cpu"), num(10),
        tup(text("v"), num(4), num(3)),
    ) + b"Q"  # fmt: skip
    tensor = call("torch._utils", "_rebuild_tensor", pid, num(1), tup(num(2)), tup(num(1)))
    head = [stop(num(0x1950A86A20F9469CFC6C)), stop(num(1001)), stop(b"}")]
    path = tmp_path / "x.pt"
    body = b"".join(head) + stop(tensor) + stop(b"]" + text("7") + b"a")
    path.write_bytes(body + (10).to_bytes(8, "little") + data)
    stored = open_torch_file(path).root
    assert isinstance(stored, StoredTensor)
    assert read_stored(stored).tolist() == [5.0, 6.0]
    assert stored.storage.key == "v"


@pytest.mark.parametrize("name", ["float32", "bfloat16", "complex64", "int8", "float64"])
def test_big_endian(tmp_path: Path, name: str) -> None:
    tensor = torch.tensor([[1.5, -2.0], [3.0, 1e-2]]).to(getattr(torch, name))
    width = tensor.itemsize // 2 if name == "complex64" else tensor.itemsize
    inner = save({"w": tensor}, tmp_path / "x.pt")
    path = tmp_path / "big.pt"
    with zipfile.ZipFile(inner) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("byteorder"):
                content = b"big"
            if "/data/" in name:
                content = np.frombuffer(content, f"u{width}").byteswap().tobytes()
            new.writestr(name, content)
    f = open_torch_file(path)
    assert f.big_endian
    assert isinstance(f.root, dict)
    assert f.root["w"].storage.big_endian
    assert_same(f.root["w"], tensor)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_exotic_tensors_are_named(tmp_path: Path) -> None:
    exotic = {
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "meta": torch.empty(3, device="meta"),
    }
    f = open_torch_file(save({**exotic, "w": torch.ones(2)}, tmp_path / "x.pt"))
    assert isinstance(f.root, dict)
    for name in exotic:
        assert exotic_kind(f.root[name]), name
    assert [path for path, _ in walk_tensors(f.root, skip_exotic=True)] == [("w",)]
    with pytest.raises(UnsupportedError, match="'sparse' is a sparse tensor"):
        list(walk_tensors(f.root))


def test_other_objects(tmp_path: Path) -> None:
    obj = {
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "path": Path("/a/b"),
        "storage": torch.ones(3).untyped_storage(),
        "rng": np.random.default_rng(0).bit_generator.state,
        "layout": torch.strided,
        "class": torch.nn.Linear,
    }
    root = open_torch_file(save(obj, tmp_path / "x.pt")).root
    assert isinstance(root, dict)
    assert root["size"] == (2, 3)
    assert root["dtype"] == dtypes.BFLOAT16
    assert root["device"] == "cuda:1"
    assert root["path"] == "/a/b"
    assert root["storage"].nbytes == 12
    assert root["rng"] == obj["rng"]
    assert isinstance(root["class"], Global)


# -- the real frameworks -------------------------------------------------------------------------


def test_frameworks_files(fixtures_dir: Path) -> None:
    files = [p for s in ("pt", "pth", "bin") for p in fixtures_dir.rglob(f"*.{s}") if p.is_file()]
    compared = 0
    for index, path in enumerate(sorted(files)):
        tensors = list(walk_tensors(open_torch_file(path).root))
        if "deepspeed" not in path.parts or index % 8:
            continue
        try:
            expected = torch.load(path, map_location="cpu", weights_only=False)
        except ModuleNotFoundError:
            continue  # torch needs the framework's classes for this one; we do not
        for where, stored in tensors:
            value = expected
            for key in where:
                value = value[key] if isinstance(value, (dict, list, tuple)) else None
            if isinstance(value, torch.Tensor):
                assert_same(stored, value)
                compared += 1
    assert compared > 100


def test_dtensor_and_sharded_tensor_files(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "torch" / "dtensor_ranksave_2x2"
    root = open_torch_file(min(folder.rglob("*.pt"))).root
    found = [r for r in _records(root) if r.name == "torch.distributed.tensor.DTensor"]
    assert found
    for record in found:
        assert isinstance(record.get("_local_tensor"), StoredTensor)
        spec = record.get("_spec")
        assert isinstance(spec, Record)
        assert {"mesh", "placements", "tensor_meta"} <= set(spec.fields)
    folder = fixtures_dir / "torch" / "fsdp1_sharded_ranksave_2r"
    root = open_torch_file(min(folder.rglob("*.pt"))).root
    assert any(r.name.endswith(".ShardedTensor") for r in _records(root))
    assert list(walk_tensors(root))


def _records(root: object) -> list[Record]:
    assert isinstance(root, dict)
    return [v for v in root.values() if isinstance(v, Record)]


def test_items_of_a_distributed_checkpoint(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "torch" / "dcp_edge_4r" / "ckpt"
    data = (folder / ".metadata").read_bytes()
    metadata = loads(data, where=".metadata")
    assert isinstance(metadata, Record)
    storage = metadata.get("storage_data")
    assert isinstance(storage, dict)
    for place in storage.values():
        path = folder / place.relative_path
        f = open_torch_file(path, place.offset, place.length)
        raw = path.read_bytes()[place.offset : place.offset + place.length]
        expected = torch.load(io.BytesIO(raw), weights_only=False)
        if isinstance(expected, torch.Tensor):
            assert_same(f.root, expected)
