"""The bytes equal ggml's: golden digests everywhere, a live library if MCONV_GGML_LIB is set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from mconv.quant import TYPES, codec, dequantize, have_native, quantize
from mconv.quant.fallback import decode
from mconv.quant.floats import to_float32

sys.path.insert(0, str(Path(__file__).parent))
from cases import digest, ggml, golden, golden_inputs, inputs

BLOCKED = [t.name for t in TYPES.values() if t.is_quantized and t.storable]
LIB = os.environ.get("MCONV_GGML_LIB")
native = pytest.mark.skipif(not have_native(), reason="no compiled kernels installed")


def instruction_sets() -> list[str]:
    module = codec._native()
    return module.instruction_sets() if module else []


def weights_for(name: str) -> list[np.ndarray | None]:
    every = golden_inputs()[1].values()
    return [w for w in every if w is not None or not TYPES[name].needs_importance]


def encode_with(isa: str, x: np.ndarray, name: str, weights: np.ndarray | None) -> np.ndarray:
    module, kind = codec._native(), TYPES[name]
    codec._install_grid(module, kind)
    out = np.empty((x.shape[0], kind.row_bytes(x.shape[1])), np.uint8)
    module.quantize(kind.id, x.view(np.uint8), 0, x.shape[1], weights, out, 1, isa)
    return out


@native
@pytest.mark.parametrize("name", BLOCKED)
def test_every_instruction_set_writes_ggmls_bytes(name):
    rows, _ = golden_inputs()
    for isa in instruction_sets():
        got = {
            case: digest(encode_with(isa, x, name, w) for w in weights_for(name))
            for case, x in rows.items()
        }
        assert got == golden()[name], isa


@native
@pytest.mark.parametrize("name", BLOCKED)
def test_bytes_do_not_depend_on_threads_or_input_type(name):
    rng = np.random.default_rng(5)
    weights = rng.gamma(0.5, 1, 768).astype(np.float32)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        x = (rng.standard_normal((301, 768)) * 0.1).astype(dtype)
        one = quantize(x, name, weights, threads=1)
        np.testing.assert_array_equal(one, quantize(x, name, weights, threads=4))
        np.testing.assert_array_equal(one, quantize(to_float32(x), name, weights, threads=3))
        np.testing.assert_array_equal(one[-1:], quantize(x[-1:], name, weights))


@pytest.mark.skipif(LIB is None, reason="MCONV_GGML_LIB does not name a libggml-base")
@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("seed", [1, 2])
def test_same_bytes_as_live_ggml(name, seed):
    kind, rng = TYPES[name], np.random.default_rng(seed)
    for x in inputs(rows=7, cols=768, seed=seed).values():
        for w in (None, rng.gamma(0.4, 1, 768).astype(np.float32)):
            if w is None and kind.needs_importance:
                continue
            want = ggml(str(LIB)).quantize(x, kind.id, kind.row_bytes(768), w)
            np.testing.assert_array_equal(quantize(x, name, w), want)


@native
@pytest.mark.parametrize("name", BLOCKED)
def test_native_decoders_agree_with_the_fallback(name):
    kind = TYPES[name]
    data = np.random.default_rng(3).integers(0, 256, (4, kind.row_bytes(1024)), np.uint8)
    got = dequantize(data, name, (4, 1024)).reshape(-1)
    with np.errstate(all="ignore"):
        want = decode(data.reshape(-1), kind)
    fine = np.isfinite(want)
    np.testing.assert_allclose(got[fine], want[fine], rtol=1e-6)


# Relative RMSE on Gaussian weights, from each format's definition with a little slack.
CEILING = {
    "Q8_0": 0.008, "Q6_K": 0.02, "Q5_K": 0.04, "Q5_1": 0.05, "Q5_0": 0.06, "Q4_K": 0.08,
    "Q4_1": 0.09, "Q4_0": 0.11, "IQ4_NL": 0.09, "IQ4_XS": 0.09, "MXFP4": 0.13, "NVFP4": 0.105,
    "Q3_K": 0.18, "IQ3_S": 0.19, "IQ3_XXS": 0.25, "Q2_K": 0.34, "IQ2_S": 0.32, "IQ2_XS": 0.35,
    "IQ2_XXS": 0.4, "IQ1_M": 0.52, "IQ1_S": 0.58, "TQ1_0": 0.9, "TQ2_0": 0.9, "Q1_0": 0.7,
    "Q2_0": 0.8,
}  # fmt: skip


@native
@pytest.mark.parametrize("name", BLOCKED)
def test_error_is_within_the_formats_reach(name):
    x = (np.random.default_rng(0).standard_normal((16, 1024)) * 0.02).astype(np.float32)
    back = dequantize(quantize(x, name, np.ones(1024, np.float32)), name, x.shape)
    error = float(np.sqrt(((back - x) ** 2).mean() / (x**2).mean()))
    assert error < CEILING[name]
