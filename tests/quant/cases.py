"""Inputs that break quantizers, and ctypes access to a real ggml.

``inputs`` gives named float32 rows: ordinary, heavy-tailed, empty, tiny, huge, tied, one-signed.
``Ggml`` wraps ``ggml_quantize_chunk`` of the library named by MCONV_GGML_LIB.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

COLS = 512
FIXTURES = Path(__file__).parent.parent / "fixtures" / "quant"


def inputs(rows: int = 4, cols: int = COLS, seed: int = 7) -> dict[str, np.ndarray]:
    """Return named float32 arrays [rows, cols]."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((rows, cols)).astype(np.float32)
    some = normal.copy()
    some.reshape(-1, 16)[::3] = 0
    outlier = normal * np.float32(1e-3)
    outlier[:, 5::97] = 30
    sparse = np.zeros((rows, cols), np.float32)
    sparse[:, 3::71] = normal[:, 3::71]
    return {
        "normal": normal,
        "weights": normal * np.float32(0.02),
        "heavy": rng.standard_t(2, (rows, cols)).astype(np.float32) * np.float32(0.02),
        "zero": np.zeros((rows, cols), np.float32),
        "negative_zero": np.full((rows, cols), -0.0, np.float32),
        "partly_zero": some,
        "sparse": sparse,
        "constant": np.full((rows, cols), 0.37, np.float32),
        "negative_constant": np.full((rows, cols), -1.5, np.float32),
        "denormal": normal * np.float32(1e-40),
        "tiny": normal * np.float32(1e-36),
        "near_eps": normal * np.float32(1e-15),
        "small": normal * np.float32(1e-8),
        "big": normal * np.float32(1e4),
        "outlier": outlier,
        "ties": rng.integers(-8, 8, (rows, cols)).astype(np.float32) * np.float32(0.5),
        "ramp": np.tile(np.arange(cols, dtype=np.float32) - 100, (rows, 1)),
        "positive": np.abs(normal),
        "negative": -np.abs(normal) - np.float32(1),
        "two_values": np.where(normal > 0, np.float32(0.1), np.float32(-0.1)),
        "ternary": np.clip(np.round(normal), -1, 1) * np.float32(0.3),
        "powers": np.exp2(rng.integers(-20, 4, (rows, cols))).astype(np.float32),
    }


def importances(cols: int = COLS, seed: int = 3) -> dict[str, np.ndarray | None]:
    """Return named importance vectors [cols]; ``none`` is None."""
    rng = np.random.default_rng(seed)
    random = rng.gamma(0.5, 1.0, cols).astype(np.float32)
    holes = random.copy()
    holes[rng.random(cols) < 0.4] = 0
    holes[:64] = 0
    return {
        "none": None,
        "ones": np.ones(cols, np.float32),
        "random": random,
        "holes": holes,
        "zeros": np.zeros(cols, np.float32),
    }


class Ggml:
    """A live libggml-base."""

    def __init__(self, path: str) -> None:
        self._lib = ctypes.CDLL(path)
        self._lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
        ]  # fmt: skip
        for name in ("fp32_to_fp16", "fp32_to_bf16"):
            getattr(self._lib, f"ggml_{name}_row").restype = None

    def quantize(
        self, x: np.ndarray, type_id: int, row_bytes: int, importance: np.ndarray | None = None
    ) -> np.ndarray:
        """Quantize float32 [rows, cols]; returns uint8 [rows, row_bytes]."""
        x = np.ascontiguousarray(x, np.float32)
        out = np.zeros((x.shape[0], row_bytes), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        self._lib.ggml_quantize_chunk(
            type_id, x.ctypes.data, out.ctypes.data, 0, x.shape[0], x.shape[1], weights
        )
        return out


@cache
def ggml(path: str) -> Ggml:
    """Return the library at ``path`` (opened once)."""
    return Ggml(path)


def digest(parts: Iterable[np.ndarray]) -> str:
    """Return a short digest of some byte arrays in order."""
    h = hashlib.sha256()
    for part in parts:
        h.update(np.ascontiguousarray(part).tobytes())
    return h.hexdigest()[:16]


@cache
def golden() -> dict[str, dict[str, str]]:
    """Return ggml's digests: type, then input name."""
    return json.loads((FIXTURES / "golden.json").read_text())


@cache
def golden_inputs() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray | None]]:
    """Return the inputs and the importance vectors behind ``golden``."""
    with np.load(FIXTURES / "inputs.npz") as data:
        arrays = {name: data[name] for name in data.files}
    weights: dict[str, np.ndarray | None] = {"none": None}
    weights |= {name[2:]: a for name, a in arrays.items() if name.startswith("w.")}
    return {name[2:]: a for name, a in arrays.items() if name.startswith("x.")}, weights
