"""Shared by the tests of the PyTorch formats: truth files, comparison, writable copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.coverage import prove

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def load_truth(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file without any code of the package."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, info in header.items():
        lo, hi = info["data_offsets"]
        flat = np.frombuffer(data[start + lo : start + hi], _DTYPES[info["dtype"]])
        found[name] = flat.reshape(info["shape"])
    return found


def assert_equals_truth(checkpoint: Checkpoint, truth: dict[str, np.ndarray]) -> None:
    """Every tensor and optimizer state bit for bit in float32, nothing missing, nothing extra."""
    got = dict(checkpoint.weights)
    for state, tensors in checkpoint.optimizer.items():
        got |= {f"{state}/{name}": t for name, t in tensors.items()}
        prove(tensors)
    prove(checkpoint.weights)
    assert sorted(got) == sorted(truth)
    for name, expected in truth.items():
        value = got[name].read()
        assert value.shape == expected.shape, name
        same = value.astype(np.float32).tobytes() == expected.astype(np.float32).tobytes()
        assert same, name


def writable_copy(source: Path, target: Path) -> Path:
    """Copy a fixture so that a test may break it."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


def cut(path: Path, count: int = 1) -> None:
    """Remove the last bytes of a file."""
    data = path.read_bytes()
    path.write_bytes(data[:-count])


def swap(a: Path, b: Path) -> None:
    """Exchange two files."""
    between = a.with_name("between.tmp")
    a.rename(between)
    b.rename(a)
    between.rename(b)
