"""``best=True``: never worse than ggml's encoding, block by block, and alike on every path."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from mconv.quant import TYPES, ErrorSums, codec, dequantize, have_native, quantize

sys.path.insert(0, str(Path(__file__).parent))
from cases import importances, inputs

BLOCKED = [t.name for t in TYPES.values() if t.is_quantized and t.storable]
native = pytest.mark.skipif(not have_native(), reason="no compiled kernels installed")


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS"])
def test_best_does_not_replace_importance(name):
    with pytest.raises(codec.QuantError, match="with best as well"):
        quantize(np.ones((1, 256), np.float32), name, best=True)


@cache
def every_input() -> np.ndarray:
    """All kinds of rows in one array [rows, 512]."""
    return np.concatenate(list(inputs(rows=2).values()))


def heavy(rows: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, (rows, 512)) * 0.02).astype(np.float32)


def weights_for(name: str) -> list[np.ndarray | None]:
    every = [w for key, w in importances().items() if key != "zeros"]
    return [w for w in every if w is not None or not TYPES[name].needs_importance]


def block_error(
    x: np.ndarray, data: np.ndarray, name: str, weights: np.ndarray | None
) -> np.ndarray:
    """Squared error per block, from gguf-py's decoder."""
    kind = TYPES[name]
    if name in ("Q1_0", "Q2_0"):
        y = dequantize(data, name, x.shape)
    else:
        y = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind.id)).reshape(x.shape)
    w = np.ones(x.shape[1]) if weights is None else weights.astype(np.float64)
    error = w * (x.astype(np.float64) - y) ** 2
    return error.reshape(-1, kind.block).sum(axis=1)


@native
@pytest.mark.parametrize("name", BLOCKED)
def test_no_block_is_worse(name):
    x = every_input()
    for weights in weights_for(name):
        plain, best = (
            block_error(x, quantize(x, name, weights, best=b), name, weights) for b in (False, True)
        )
        fine = np.isfinite(plain)
        assert (best[fine] <= plain[fine] * (1 + 1e-5)).all()


# How much of ggml's error is left at most on heavy-tailed weights, from the searches' design.
LEFT = {
    "Q1_0": 1.0, "Q6_K": 0.99, "Q4_K": 0.992, "Q5_K": 0.985, "IQ4_NL": 0.985, "IQ4_XS": 0.985,
    "MXFP4": 0.98, "NVFP4": 0.92, "TQ1_0": 0.7, "TQ2_0": 0.7, "Q2_0": 0.6, "IQ3_S": 0.85,
    "IQ3_XXS": 0.85,
}  # fmt: skip


@native
@pytest.mark.parametrize("name", BLOCKED)
def test_error_is_lower_and_reported(name):
    x = heavy(32)
    for weights in weights_for(name)[-1:] + ([] if TYPES[name].needs_importance else [None]):
        plain, best = ErrorSums(), ErrorSums()
        a = quantize(x, name, weights, errors=plain)
        b = quantize(x, name, weights, best=True, errors=best)
        for sums, data in ((plain, a), (best, b)):
            own = block_error(x, data, name, weights).sum()
            assert sums.chosen == pytest.approx(own, rel=1e-4)
        assert plain.chosen == plain.default == best.default
        assert plain.squares == best.squares
        limit = 1.0 if weights is not None else LEFT.get(name, 0.97)
        assert best.chosen_rmse <= limit * best.default_rmse
        np.testing.assert_array_equal(a, quantize(x, name, weights))


def data_of(name: str, x: np.ndarray, weights: np.ndarray | None, device: str = "cpu"):
    sums = ErrorSums()
    return quantize(x, name, weights, best=True, device=device, errors=sums), sums


@native
@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("path", ["numpy", "torch"])
def test_every_path_writes_the_same(name, path, monkeypatch, request):
    if path == "torch":
        request.getfixturevalue("torch_alone")
    x = np.concatenate([heavy(3), every_input()[::7]])
    weights = weights_for(name)[-1]
    want, sums = data_of(name, x, weights)
    if path == "numpy":
        monkeypatch.setattr(codec, "_native", lambda: None)
    got, other = data_of(name, x, weights, "cpu" if path == "numpy" else "cpu:0")
    np.testing.assert_array_equal(got, want)
    assert other.chosen == pytest.approx(sums.chosen, rel=1e-6)


@native
@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "NVFP4", "Q2_0"])
def test_bytes_do_not_depend_on_threads_or_instructions(name):
    x = heavy(301)
    sums = [ErrorSums(), ErrorSums()]
    one = quantize(x, name, best=True, threads=1, errors=sums[0])
    np.testing.assert_array_equal(one, quantize(x, name, best=True, threads=4, errors=sums[1]))
    assert sums[0] == sums[1]
    module, kind = codec._native(), TYPES[name]
    for isa in module.instruction_sets():
        out = np.empty_like(one)
        module.quantize(kind.id, x.view(np.uint8), 0, 512, None, out, 2, isa, True, None)
        np.testing.assert_array_equal(out, one)


@pytest.mark.parametrize("fallback", [False, True])
def test_iq3_s_keeps_what_follows_a_run_of_zeros(fallback, monkeypatch):
    if fallback:
        monkeypatch.setattr(codec, "_native", lambda: None)
    x = heavy(4)
    x[:, 32:96] = 0
    plain, best = ErrorSums(), ErrorSums()
    quantize(x, "IQ3_S", errors=plain)
    quantize(x, "IQ3_S", best=True, errors=best)
    assert plain.chosen_rmse > 0.5  # ggml's bytes decode wrongly
    assert best.chosen_rmse < 0.2


def test_casts_have_no_errors_to_report():
    sums = ErrorSums()
    x = heavy(1)
    np.testing.assert_array_equal(quantize(x, "BF16", best=True, errors=sums), quantize(x, "BF16"))
    assert sums == ErrorSums() and sums.chosen_rmse == 0
