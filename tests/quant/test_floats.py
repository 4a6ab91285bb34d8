"""Float casts and the type table, against gguf-py and hand-computed bits."""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest
from mconv.errors import QuantError
from mconv.quant import TYPES, codec, dequantize, quantize, type_by_id, type_by_name

EDGES = np.array(
    [0x00000000, 0x80000000, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001,
     0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F800001,
     0xFF812345, 0x00000001, 0x807FFFFF, 0x00800000, 0x33000000, 0x33000001, 0x38800000,
     0x387FC000, 0x387FE000, 0x387FF000, 0x477FE000, 0x3F801000, 0x3F803000, 0x42F6E979],
    np.uint32,
).view(np.float32)  # fmt: skip


@pytest.fixture(params=["native", "numpy"], autouse=True)
def path(request, monkeypatch):
    """Run every test with the compiled kernels and without."""
    if request.param == "numpy":
        monkeypatch.setattr(codec, "_native", lambda: None)
    elif codec._native() is None:
        pytest.skip("no compiled kernels installed")


def test_table_agrees_with_gguf():
    for t in gguf.GGMLQuantizationType:
        ours = type_by_id(int(t))
        assert ours.name == t.name
        if t.name != "Q8_1":  # gguf-py counts its two halves as floats
            assert (ours.block, ours.bytes) == gguf.GGML_QUANT_SIZES[t]
    assert TYPES["Q4_K"].bpw == 4.5


def test_unknown_types_are_explained():
    with pytest.raises(QuantError, match="did you mean 'Q4_K'"):
        type_by_name("Q4K")
    with pytest.raises(QuantError, match="id 4:"):
        type_by_id(4)


def test_bf16_rounds_to_even_and_keeps_nan():
    got = quantize(EDGES[None], "BF16").view(np.uint16)[0]
    bits = EDGES.view(np.uint32).astype(np.uint64)
    want = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = np.isnan(EDGES)
    want[nan] = (bits[nan] >> 16).astype(np.uint16) | 64
    np.testing.assert_array_equal(got, want)


def test_f16_rounds_to_even_and_has_one_nan():
    fine = EDGES[~(np.isfinite(EDGES) & (np.abs(EDGES) >= 65520))]
    got = quantize(fine[None], "F16").view(np.uint16)[0]
    with np.errstate(all="ignore"):
        want = fine.astype(np.float16).view(np.uint16).copy()
    nan = np.isnan(fine)
    want[nan] = np.where(np.signbit(fine[nan]), 0xFE00, 0x7E00)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_same_bytes_as_gguf_py(name):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 96)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    want = np.ascontiguousarray(gguf.quants.quantize(x, kind)).view(np.uint8).reshape(5, -1)
    np.testing.assert_array_equal(quantize(x, name), want)
    back = dequantize(quantize(x, name), name, x.shape)
    np.testing.assert_array_equal(
        back, gguf.quants.dequantize(want, kind).astype(np.float32).reshape(x.shape)
        if name != "F32" else x,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_inputs_quantize_as_their_float32_value(dtype):
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(dtype)
    for name in ("F32", "F16", "BF16", "Q8_0"):
        np.testing.assert_array_equal(quantize(x, name), quantize(x.astype(np.float32), name))


def test_all_16_bit_values_survive_a_round_trip():
    bits = np.arange(1 << 16, dtype=np.uint16)
    for dtype, name in ((np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")):
        x = bits.view(dtype)[None]
        np.testing.assert_array_equal(quantize(x, name).view(np.uint16)[0], bits)
        wide = quantize(x, "F32").view(np.float32)
        fine = ~np.isnan(wide)
        np.testing.assert_array_equal(wide[fine], x.astype(np.float32)[fine])
        back = dequantize(quantize(x, name), name, x.shape, dtype=dtype)
        np.testing.assert_array_equal(back.view(np.uint16)[fine], x.view(np.uint16)[fine])


@pytest.mark.parametrize(
    ("x", "name", "message"),
    [
        (np.zeros((2, 32)), "Q8_0", "float64"),
        (np.zeros((2, 33), np.float32), "Q8_0", "33"),
        (np.full((2, 32), np.nan, np.float32), "Q8_0", "64 of 64 values"),
        (np.full((2, 32), 1e30, np.float32), "Q8_0", "float16"),
        (np.full((2, 32), 7e4, np.float32), "F16", "float16"),
        (np.zeros((2, 256), np.float32), "IQ2_XXS", "importance"),
        (np.zeros((2, 32), np.float32), "Q8_1", "not a type"),
        (np.zeros((32, 2), np.float32).T, "Q8_0", "contiguous"),
    ],
)
def test_bad_input_is_refused(x, name, message):
    with pytest.raises(QuantError, match=message):
        quantize(x, name)


def test_wrong_data_size_is_refused():
    with pytest.raises(QuantError, match="68 bytes, got 67"):
        dequantize(np.zeros(67, np.uint8), "Q8_0", (2, 32))


@pytest.mark.parametrize(
    "importance",
    [np.ones(31, np.float32), np.full(32, np.nan, np.float32), np.full(32, -1, np.float32)],
)
def test_bad_importance_is_refused(importance):
    with pytest.raises(QuantError, match="importance"):
        quantize(np.zeros((1, 32), np.float32), "Q4_0", importance)
