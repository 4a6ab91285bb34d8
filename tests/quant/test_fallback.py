"""The array programs write ggml's bytes too: in numpy without the native module, and in torch."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from mconv.errors import ConfigError, QuantError
from mconv.quant import TYPES, codec, quantize
from mconv.quant.fallback.neighbours import _SHAPES, grid
from mconv.quant.grids import load_grid

sys.path.insert(0, str(Path(__file__).parent))
from cases import digest, golden, golden_inputs

BLOCKED = [t.name for t in TYPES.values() if t.is_quantized and t.storable]


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(codec, "_native", lambda: None)


def digests(name: str, device: str = "cpu") -> dict[str, str]:
    """Encode every golden input in one call per importance vector; digests per input."""
    rows, weights = golden_inputs()
    stacked, size = np.concatenate(list(rows.values())), len(next(iter(rows.values())))
    wanted = [w for w in weights.values() if w is not None or not TYPES[name].needs_importance]
    parts = [quantize(stacked, name, w, device=device) for w in wanted]
    return {
        case: digest(part[i * size : (i + 1) * size] for part in parts)
        for i, case in enumerate(rows)
    }


@pytest.mark.parametrize("name", BLOCKED)
def test_numpy_writes_ggmls_bytes(name, no_native):
    assert digests(name) == golden()[name]


@pytest.mark.parametrize("name", BLOCKED)
def test_torch_writes_ggmls_bytes(name, torch_alone):
    assert digests(name, "cpu:0") == golden()[name]


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "native"])
def test_large_nvfp4_scales_are_ggmls(device, monkeypatch):
    """ggml has no scale between 240 and 448, and takes 448 from 248 on."""
    if device != "native":
        monkeypatch.setattr(codec, "_native", lambda: None)
    x = np.zeros((6, 64), np.float32)
    x[:, 0] = np.float32(6) * np.array([200, 247, 248, 256, 300, 1e4], np.float32)
    data = quantize(x, "NVFP4", device="cpu" if device == "native" else device)
    assert data[:, 0].tolist() == [0x75, 0x77, 0x7E, 0x7E, 0x7E, 0x7E]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_torch_reads_narrow_floats(dtype, torch_alone):
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(dtype)
    np.testing.assert_array_equal(quantize(x, "Q4_K", device="cpu:0"), quantize(x, "Q4_K"))


def test_plain_floats_are_cast_on_the_cpu_whatever_the_device():
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    np.testing.assert_array_equal(quantize(x, "BF16", device="cpu:0"), quantize(x, "BF16"))


def test_unknown_device_is_explained():
    pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="use device='cpu'"):
        quantize(np.zeros((1, 256), np.float32), "Q4_K", device="warp")


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_bad_values_are_refused_on_every_path(device, no_native):
    if device != "cpu":
        pytest.importorskip("torch")
    x = np.zeros((2, 256), np.float32)
    x[1, 7] = np.inf
    with pytest.raises(QuantError, match="row 1, column 7"):
        quantize(x, "Q4_K", device=device)
    with pytest.raises(QuantError, match="float16"):
        quantize(np.full((1, 256), -1e30, np.float32), "Q4_K", device=device)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_neighbour_lists_hold_the_nearest_points(name):
    """By brute force, for some vectors of each grid."""
    points, values = load_grid(name)
    table, dims = grid(name), values.size // points.size
    levels = points[:, None] >> table.bits * np.arange(dims) & (1 << table.bits) - 1
    off = np.flatnonzero(table.count)
    for vector in off[:: len(off) // 20]:
        own = vector >> table.bits * np.arange(dims) & (1 << table.bits) - 1
        far = ((levels.astype(int) - own) ** 2).sum(1)
        near = np.unique(far)[: _SHAPES[name][1]]
        want = [points[i] for d in near for i in np.flatnonzero(far == d)]
        at = table.first[vector]
        assert table.near[at : at + table.count[vector]].tolist() == want
