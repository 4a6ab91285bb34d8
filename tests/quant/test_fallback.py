"""The array programs write ggml's bytes too: in numpy without the native module, and in torch."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from mconv.errors import ConfigError, QuantError
from mconv.quant import TYPES, codec, quantize
from mconv.quant.fallback import _found, array_encoder

sys.path.insert(0, str(Path(__file__).parent))
from cases import digest, golden, golden_inputs

NUMPY = sorted(_found("ENCODERS"))
ARRAY = [name for name in NUMPY if array_encoder(TYPES[name])]


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(codec, "_native", lambda: None)


def digests(name: str, device: str = "cpu") -> dict[str, str]:
    """Encode every golden input in one call per importance vector; digests per input."""
    rows, weights = golden_inputs()
    stacked, size = np.concatenate(list(rows.values())), len(next(iter(rows.values())))
    parts = [quantize(stacked, name, w, device=device) for w in weights.values()]
    return {
        case: digest(part[i * size : (i + 1) * size] for part in parts)
        for i, case in enumerate(rows)
    }


@pytest.mark.parametrize("name", NUMPY)
def test_numpy_writes_ggmls_bytes(name, no_native):
    assert digests(name) == golden()[name]


@pytest.mark.parametrize("name", ARRAY)
def test_torch_writes_ggmls_bytes(name):
    pytest.importorskip("torch")
    assert digests(name, "cpu:0") == golden()[name]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_torch_reads_narrow_floats(dtype):
    pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(dtype)
    np.testing.assert_array_equal(quantize(x, "Q4_K", device="cpu:0"), quantize(x, "Q4_K"))


def test_types_without_array_program_use_the_cpu():
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    np.testing.assert_array_equal(quantize(x, "Q8_0", device="cpu:0"), quantize(x, "Q8_0"))


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


def test_types_without_a_fallback_say_so(no_native):
    with pytest.raises(QuantError, match="native kernels"):
        quantize(np.zeros((1, 256), np.float32), "IQ3_S")
