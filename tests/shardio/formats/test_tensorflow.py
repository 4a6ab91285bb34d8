"""TensorFlow checkpoints: both fixtures, the ordered code of slices, broken indexes."""

from __future__ import annotations

from pathlib import Path

import pytest
from mconv.errors import FormatError, MconvError
from mconv.shardio import tensor_bundle
from mconv.shardio.crc32c import crc32c
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.tensor_bundle import _signed

from .torch_cases import assert_equals_truth, cut, load_truth, writable_copy

CASES = ["tf2_object", "tf1_partitioned"]


@pytest.mark.parametrize("case", CASES)
def test_equals_truth(fixtures_dir: Path, case: str) -> None:
    folder = fixtures_dir / "tf" / case
    checkpoint = open_checkpoint(folder / "ckpt")
    assert checkpoint.format == "tensorflow"
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_its_files_open_it(fixtures_dir: Path, name: str) -> None:
    folder = fixtures_dir / "tf" / "tf1_partitioned" / "ckpt"
    assert open_checkpoint(folder / name).path.name == "model.ckpt.index"


@pytest.mark.parametrize(
    ("value", "code"),
    [(0, "80"), (63, "bf"), (64, "c040"), (107, "c06b"), (320, "c140"), (8191, "dfff"),
     (8192, "e02000"), (-1, "7f"), (-64, "40"), (-65, "3fbf")],
)  # fmt: skip
def test_ordered_code(value: int, code: str) -> None:
    """Vectors of TensorFlow's ordered_code_test.cc and the fixture."""
    assert _signed(value).hex() == code


def test_crc32c() -> None:
    """Vectors of RFC 3720."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


@pytest.fixture
def copy(fixtures_dir: Path, tmp_path: Path) -> Path:
    return writable_copy(fixtures_dir / "tf/tf2_object/ckpt", tmp_path / "c")


class AnyNumber:
    """Equals everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __ne__(self, other: object) -> bool:
        return False


def test_missing_data_file(copy: Path) -> None:
    (copy / "model.ckpt-1.data-00000-of-00001").unlink()
    with pytest.raises(FormatError, match="data-00000-of-00001"):
        open_checkpoint(copy)


def test_truncated_data_file(copy: Path) -> None:
    cut(copy / "model.ckpt-1.data-00000-of-00001", 7000)
    with pytest.raises(FormatError):
        open_checkpoint(copy)


def test_data_of_another_save(copy: Path, fixtures_dir: Path) -> None:
    other = fixtures_dir / "tf/tf1_partitioned/ckpt/model.ckpt.data-00000-of-00001"
    (copy / "model.ckpt-1.data-00000-of-00001").write_bytes(other.read_bytes())
    with pytest.raises(FormatError, match="truncated"):
        open_checkpoint(copy)


@pytest.mark.parametrize("checked", [True, False])
def test_mutated_indexes_never_crash(
    copy: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """With the checksums, and with an attacker who makes them fit."""
    if not checked:
        monkeypatch.setattr(tensor_bundle, "masked", lambda crc: AnyNumber())
    import random

    path = copy / "model.ckpt-1.index"
    whole = path.read_bytes()
    rng = random.Random(4)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data) - 8)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            open_checkpoint(path, format="tensorflow")
        except MconvError:
            continue
