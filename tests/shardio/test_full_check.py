"""A full check finds every kind of damage that a metadata check cannot see, and nothing in sound
checkpoints; memory stays bounded.
"""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from mconv.errors import FormatError
from mconv.shardio import open_checkpoint
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.checksums import archive_checksums, mismatch
from mconv.shardio.chunked import Chunked
from mconv.shardio.crc32c import crc32c, masked
from mconv.shardio.dtypes import BFLOAT16, FLOAT32
from mconv.shardio.full_check import verify_checkpoint
from mconv.shardio.source import FileSource
from mconv.shardio.tensor import from_array
from mconv.shardio.tensor_detail import tensor_detail


def checkpoint(**fields: object) -> Checkpoint:
    return Checkpoint(path=Path("here"), format="hf", **fields)  # type: ignore[arg-type]


def lazy(*shape: int, dtype: object = FLOAT32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)  # type: ignore[call-overload,no-any-return]


def problems(ckpt: Checkpoint) -> dict[str, str]:
    return {f.name: f.problem for f in verify_checkpoint(ckpt).problems}


def test_crc32c_is_the_published_one_at_every_length() -> None:
    def slow(data: bytes) -> int:
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        return crc ^ 0xFFFFFFFF

    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720
    assert crc32c(bytes(32)) == 0x8A9136AA
    data = np.random.default_rng(3).bytes(90_000)
    for length in (0, 1, 65535, 65536, 65537, 70_001, 90_000):
        assert crc32c(data[:length]) == slow(data[:length])
    assert crc32c(data[70_000:], crc32c(data[:70_000])) == crc32c(data)


@pytest.mark.parametrize("dtype", [np.float16, FLOAT32, np.float64, BFLOAT16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(dtype: object, value: float) -> None:
    bad = lazy(700, 40, dtype=dtype)
    bad[433, 7] = value
    bad[600, 1] = value
    ckpt = checkpoint(weights={"a": from_array(lazy(9)), "b": from_array(bad)})
    kind = "NaN" if np.isnan(value) else "infinite"
    assert problems(ckpt) == {"b": f"2 {kind} values, first at [433, 7]"}


def test_scalars_and_integers() -> None:
    weights = {
        "i": from_array(np.arange(5)),
        "nothing": from_array(np.zeros((0, 3), np.float32)),
        "scalar": from_array(np.array(np.nan, np.float32)),
    }
    assert problems(checkpoint(weights=weights)) == {"scalar": "1 NaN values, first at []"}


def test_copies_must_be_equal() -> None:
    good, bad = lazy(64, 64), lazy(64, 64)
    bad[63, 63] = np.nextafter(bad[63, 63], 9, dtype=np.float32)
    other = from_array(lazy(64, 63))
    ckpt = checkpoint(
        weights={n: from_array(good) for n in "abc"},
        replicas={
            "a": (from_array(good), from_array(good)),
            "b": (from_array(good), from_array(bad, "there")),
            "c": (other,),
        },
    )
    found = problems(ckpt)
    assert set(found) == {"b", "c"}
    assert "there" in found["b"]
    assert verify_checkpoint(ckpt).checked["copies"] == 5


def test_masters_must_round_to_the_weights() -> None:
    master = lazy(50, 30)
    weight = master.astype(BFLOAT16)
    wrong = weight.copy()
    wrong[3, 4] = 7
    ckpt = checkpoint(
        weights={"a": from_array(weight), "b": from_array(wrong), "c": from_array(weight)},
        optimizer={
            "master": {
                "a": from_array(master),
                "b": from_array(master),
                "c": from_array(master[:9]),
            },
            "exp_avg": {"a": from_array(np.full((50, 30), np.inf, np.float32))},
        },
    )
    found = problems(ckpt)
    assert set(found) == {"b", "c", "exp_avg.a"}
    assert found["b"].startswith("1 of 1500 compared elements differ")
    assert "first at [3, 4]" in found["b"]
    assert "shape (9, 30)" in found["c"]
    assert "1500 infinite" in found["exp_avg.a"]


def test_holes_and_short_files_are_told_once(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    source = FileSource.of(path)
    short = Chunked.contiguous(source, 0, (50,), FLOAT32)
    hole = Chunked((50,), FLOAT32, Chunked.contiguous(source, 0, (20,), FLOAT32).chunks)
    late = Chunked.contiguous(source, 0, (20,), FLOAT32)
    ckpt = checkpoint(weights={"short": short, "hole": hole, "late": late})
    path.write_bytes(bytes(50))  # shrinks after it was opened
    found = verify_checkpoint(ckpt).problems
    assert sorted(f.name for f in found) == ["hole", "late", "short"]


ARCHIVES = {
    "deepspeed/z2_dp2_fp16/ckpt": "*/*rank_1*optim_states.pt",
    "torch/dcp_fsdp2_2r/ckpt": "__1_0.distcp",
    "torch/hf_bin_sharded/ckpt": "*00002*.bin",
    "megatron/opt_dist_tp2dp2/torch": "*/*/distrib_optim.pt",
    "tf/tf2_object/ckpt": "*.data-00000-of-00001",
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_one_changed_bit_is_found(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(fixtures_dir / case, tmp_path / "ckpt"))
    victim = min(folder.glob(ARCHIVES[case]))
    ckpt = open_checkpoint(folder)
    before = verify_checkpoint(ckpt)
    assert before.sound, before.problems
    assert before.checked["checksums"] > 0
    found = [p for name in ckpt.weights for p in tensor_detail(ckpt, name).pieces]
    for state, tensors in ckpt.optimizer.items():
        found += [p for n in tensors for p in tensor_detail(ckpt, f"{state}.{n}").pieces]
    places = [p.offset for p in found if p.path.name == victim.name]
    victim.chmod(0o644)
    data = bytearray(victim.read_bytes())
    data[places[len(places) // 2]] ^= 1
    victim.write_bytes(data)
    after = verify_checkpoint(open_checkpoint(folder))
    assert any(f"{victim.name}: bytes" in f.problem for f in after.problems)
    assert any("CRC-32" in f.problem for f in after.problems)


def test_archives_one_after_the_other(fixtures_dir: Path) -> None:
    path = fixtures_dir / "torch/dcp_fsdp2_2r/ckpt/__0_0.distcp"
    sums = archive_checksums(path)
    assert len({c.offset for c in sums}) == len(sums) > 100
    assert not any(mismatch(c) for c in sums)
    assert sum(c.name.endswith("data.pkl") for c in sums) > 50


def test_other_files_have_no_archives(tmp_path: Path) -> None:
    for k, raw in enumerate((b"", b"PK\5\6", b"x" * 100, b"PK\5\6" + bytes(17))):
        path = tmp_path / str(k)
        path.write_bytes(raw)
        assert archive_checksums(path) == []
    path.write_bytes(b"PK\5\6" + b"\0" * 4 + b"\1\0\1\0" + b"\xff" * 8 + b"\0\0")
    assert archive_checksums(path) == []
    with pytest.raises(FormatError, match="absent"):
        archive_checksums(tmp_path / "absent")


def test_masked_is_not_the_checksum() -> None:
    assert masked(0) == 0xA282EAD8


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "big"
    with path.open("wb") as f:
        f.truncate(256 << 20)
    source = FileSource.of(path)
    big = Chunked.contiguous(source, 0, (32 << 20,), FLOAT32)
    half = Chunked.contiguous(source, 0, (32 << 20,), BFLOAT16)
    ckpt = checkpoint(
        weights={"w": half}, optimizer={"master": {"w": big}}, replicas={"w": (half, half)}
    )
    done: list[tuple[int, int]] = []
    tracemalloc.start()
    found = verify_checkpoint(ckpt, lambda n, total: done.append((n, total)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.sound
    assert done[-1] == ((64 * 3 + 128) << 20,) * 2
    assert peak < 40 << 20


def test_fixtures_are_sound(fixtures_dir: Path) -> None:
    cases = ("deepspeed/*/ckpt", "megatron/*/torch", "megatron/*/torch_dist", "torch/*/ckpt")
    folders = [f for pattern in cases for f in sorted(fixtures_dir.glob(pattern))]
    assert len(folders) > 50
    for folder in folders:
        if folder.parent.name == "peft_lora":  # needs its base model
            continue
        ckpt = open_checkpoint(folder)
        found = verify_checkpoint(ckpt)
        assert found.sound, (folder, found.problems[:3])
        assert found.checked["tensors"] >= len(ckpt.weights)
