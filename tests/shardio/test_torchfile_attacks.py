"""torch.save files that lie: truncated, forged, repacked, mutated; and walks that would not end."""

from __future__ import annotations

import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.errors import FormatError, MconvError, UnsupportedError
from mconv.shardio.records import Record, StoredTensor, walk_tensors
from mconv.shardio.torchfile import open_torch_file, read_stored

from .pickle_code import call, num, stop, text, tup

torch = pytest.importorskip("torch")
LEGACY = {"_use_new_zipfile_serialization": False}


def save(obj: object, path: Path, legacy: bool = False) -> Path:
    torch.save(obj, path, **(LEGACY if legacy else {}))
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_truncation_is_noticed(tmp_path: Path, legacy: bool) -> None:
    whole = save({"w": torch.arange(30.0)}, tmp_path / "x.pt", legacy).read_bytes()
    path = tmp_path / "cut.pt"
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError, match=r"cut\.pt"):
            open_torch_file(path)


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        (b"", FormatError, "the file is empty"),
        (bytes(4096), FormatError, "zeros only"),
        (b"version https://git-lfs.github.com/spec/v1\n", FormatError, "git lfs pull"),
        (b"<!DOCTYPE html>", FormatError, "web page"),
        (b"GGUF\x03", FormatError, "GGUF"),
        (b"\x80\x04N.", FormatError, r"not a file of torch\.save"),
        (b"x".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0"), UnsupportedError, "tar file"),
    ],
)
def test_other_files(tmp_path: Path, raw: bytes, error: type, message: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(raw)
    with pytest.raises(error, match=message):
        open_torch_file(path)
    with pytest.raises(FormatError, match="cannot be"):
        open_torch_file(tmp_path)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as z:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"):
            z.writestr(name, b"\x80\x02N.")
    with pytest.raises(UnsupportedError, match="TorchScript"):
        open_torch_file(path)


FLOATS = b"ctorch\nFloatStorage\n"


def storage_id(key: str = "0", count: int = 6, cls: bytes = FLOATS) -> bytes:
    return tup(text("storage"), cls, text(key), text("cpu"), num(count)) + b"Q"


def tensor_code(
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
    **kwargs: Any,
) -> bytes:
    parts = (num(offset), tup(*map(num, shape)), tup(*map(num, stride)))
    return call("torch._utils", "_rebuild_tensor_v2", storage_id(**kwargs), *parts, b"\x89", b"N")


def forge(path: Path, program: bytes, extra: dict[str, bytes] | None = None, **info: Any) -> Path:
    entries = {"a/data.pkl": stop(program), "a/byteorder": b"little", "a/data/0": bytes(24)}
    with zipfile.ZipFile(path, "w", **info) as z:
        for name, content in {**entries, **(extra or {})}.items():
            z.writestr(name, content)
    return path


LIES = {
    "offset": (tensor_code(offset=1), "needs 28 bytes, but the storage has 24"),
    "shape": (tensor_code(shape=(3, 3)), "needs 36 bytes"),
    "stride": (tensor_code(stride=(4, 1)), "needs 28 bytes"),
    "huge": (tensor_code(shape=(2**62, 2**62)), "repeats few|needs"),
    "expanded bomb": (tensor_code(shape=(2**40,), stride=(0,)), "repeats few elements"),
    "negative stride": (tensor_code(stride=(-3, 1)), "no size"),
    "negative offset": (tensor_code(offset=-1), "no size"),
    "dims": (tensor_code(stride=(1,)), "2 sizes but 1 strides"),
    "many dims": (tensor_code(shape=(1,) * 65, stride=(1,) * 65), "65 sizes"),
    "count": (tensor_code(count=7), r"storage '0' should have 28 bytes \(7 x float32\).* has 24"),
    "negative count": (tensor_code(count=-1), "no usable key or size"),
    "missing": (tensor_code(key="1"), "storage '1' is not in the archive"),
    "path": (tensor_code(key="../../../etc/passwd"), "is not in the archive"),
    "class": (tensor_code(cls=b"cos\nsystem\n"), "storage class 'os.system' is not known"),
    "class is data": (tensor_code(cls=b"N"), "storage class 'unknown'"),
    "not a storage": (tup(text("module"), b"N") + b"Q", "not a storage"),
    "pid": (b"NQ", "not a storage"),
    "shape is text": (
        call("torch._utils", "_rebuild_tensor_v2", storage_id(), num(0), text("ab"), text("ab")),
        "not a tuple",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_lying_pickles(tmp_path: Path, name: str) -> None:
    program, message = LIES[name]
    with pytest.raises(FormatError, match=message) as caught:
        open_torch_file(forge(tmp_path / "x.pt", program))
    assert str(tmp_path / "x.pt") in str(caught.value)


def test_honest_forgery_is_read(tmp_path: Path) -> None:
    assert isinstance(open_torch_file(forge(tmp_path / "x.pt", tensor_code())).root, StoredTensor)


def patched(whole: bytes, name: bytes, field: int, value: int, size: int = 4) -> bytes:
    """Change a field of an entry in the central directory."""
    at = whole.rindex(b"PK\x01\x02", 0, whole.rindex(name)) + field
    return whole[:at] + value.to_bytes(size, "little") + whole[at + size :]


def test_lying_archives(tmp_path: Path) -> None:
    path = forge(tmp_path / "x.pt", tensor_code())
    whole = path.read_bytes()
    data = b"a/data/0"
    cases = {
        "compressed": patched(whole, data, 10, 8, 2),
        "is encrypted": patched(whole, data, 8, 1, 2),
        "overlaps": patched(whole, data, 42, 0),
        "overlaps the next|overlaps another": patched(patched(whole, data, 20, 99), data, 24, 99),
        "entries instead of": whole[:-12] + b"\x09\x00" + whole[-10:],
        "another name": whole.replace(data, b"a/data/9", 1),
        "leaves the archive": whole.replace(data, b"../ata/0"),
        "no local header": whole[:4] + whole[4:].replace(b"PK\x03\x04", b"PK\x03\x05"),
        "directory is damaged": whole.replace(b"PK\x01\x02", b"PK\x01\x03"),
    }  # fmt: skip
    for message, raw in cases.items():
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=message):
            open_torch_file(path)


def test_duplicate_entries_and_repacked_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    forge(path, tensor_code())
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as z:
        z.writestr("a/data/0", bytes(24))
    with pytest.raises(FormatError, match="duplicate"):
        open_torch_file(path)
    forge(path, tensor_code(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="compressed"):
        open_torch_file(path)
    forge(path, b"N", {"b/data.pkl": b"N."})
    with pytest.raises(FormatError, match=r"without data\.pkl in its only folder"):
        open_torch_file(path)
    forge(path, b"N", {"a/byteorder": b"middle"})
    with pytest.raises(FormatError, match="byteorder"):
        open_torch_file(path)


def test_zip64_and_offsets_above_4_gb(tmp_path: Path) -> None:
    """A sparse file with its storage behind 5 GB; all sizes in zip64 extra fields."""
    far = 5 << 30
    local = struct.Struct("<4s5H3L2H")
    central = struct.Struct("<4s6H3L5H2L")
    program, payload = stop(tensor_code()), np.arange(6, dtype="<f4").tobytes()
    directory = b""
    path = tmp_path / "x.pt"
    with path.open("wb") as f:
        for name, content, at in ((b"a/data.pkl", program, 0), (b"a/data/0", payload, far)):
            f.seek(at)
            f.write(local.pack(b"PK\x03\x04", 45, 0, 0, 0, 0, 0, *[2**32 - 1] * 2, len(name), 0))
            f.write(name + content)
            extra = struct.pack("<2H3Q", 1, 24, len(content), len(content), at)
            full, sizes = 2**32 - 1, (len(name), len(extra))
            fixed = (45, 45, 0, 0, 0, 0, 0, full, full, *sizes, 0, 0, 0, 0, full)
            directory += central.pack(b"PK\x01\x02", *fixed) + name + extra
        start = f.tell()
        f.write(directory)
        end = f.tell()
        f.write(
            struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(directory), start)
        )
        f.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        f.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, *[2**32 - 1] * 2, 0))
    root = open_torch_file(path).root
    assert isinstance(root, StoredTensor)
    assert root.storage.offset > far
    assert read_stored(root).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_mutants_raise_format_errors_or_stay_inside(tmp_path: Path, legacy: bool) -> None:
    whole = save(
        {"w": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(2, dtype=torch.bfloat16)},
        tmp_path / "x.pt",
        legacy,
    ).read_bytes()
    rng = random.Random(11)
    path = tmp_path / "mutant.pt"
    refused = 0
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            if rng.random() < 0.8:
                raw[at] = rng.choice([0, 1, 0xFF, raw[at] ^ 1 << rng.randrange(8)])
            else:
                del raw[at : at + rng.randint(1, 8)]
        path.write_bytes(raw)
        try:
            for _, tensor in walk_tensors(open_torch_file(path).root):
                assert tensor.file_offset + tensor.span * tensor.dtype.itemsize <= len(raw)
                read_stored(tensor)
        except MconvError as e:
            refused += 1
            assert "mutant.pt" in str(e) or "nested" in str(e) or " is a" in str(e)
    assert 40 < refused < 400


def test_walking_is_bounded(tmp_path: Path) -> None:
    f = open_torch_file(save({"w": torch.ones(2)}, tmp_path / "x.pt"))
    assert isinstance(f.root, dict)
    leaf = f.root["w"]
    cycle = Record("m.A")
    cycle.state = {"me": cycle, "w": leaf}
    assert [p for p, _ in walk_tensors([cycle])] == [(0, "w")]
    doubled: list[Any] = [leaf]
    for _ in range(60):
        doubled = [doubled, doubled]
    with pytest.raises(FormatError, match="repeats itself too often"):
        for _ in walk_tensors(doubled):
            pass
    barren: list[Any] = [1] * 1000
    for _ in range(60):
        barren = [barren, barren]
    assert list(walk_tensors([barren, leaf])) == [((1,), leaf)]
    deep: list[Any] = [leaf]
    for _ in range(600):
        deep = [deep]
    with pytest.raises(FormatError, match="nested too deeply"):
        list(walk_tensors(deep))
