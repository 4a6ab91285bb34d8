"""Lazy tensors over GGUF files, and their encoding row by row."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mconv.convert.gguf import TensorSpec, build_header, open_gguf
from mconv.convert.gguf.encode import Encoding, encoded, not_finite
from mconv.convert.gguf.files import OutTensor, cut_by_size, shard_name
from mconv.convert.gguf.tensors import GgufTensors
from mconv.errors import QuantError, UnsupportedError
from mconv.quant import dequantize, quantize, type_by_name
from mconv.shardio.payload import BytesPayload
from mconv.shardio.tensor import from_array

RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((3, 5, 512)).astype(np.float32)


def one_tensor(path: Path, kind: str, **header: bool) -> GgufTensors:
    data = quantize(VALUES, kind)
    spec = TensorSpec("x.weight", VALUES.shape, type_by_name(kind).id, data.nbytes)
    head = build_header([], [spec], **header)
    path.write_bytes(
        head.data + data.tobytes() + bytes(head.file_size - len(head.data) - data.nbytes)
    )
    return GgufTensors(open_gguf(path))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "IQ4_NL", "TQ1_0"])
def test_any_region_reads_as_the_whole(tmp_path: Path, kind: str) -> None:
    tensors = one_tensor(tmp_path / "x.gguf", kind)
    lazy = tensors.values("x.weight")
    whole = dequantize(quantize(VALUES, kind), kind, VALUES.shape)
    assert lazy.shape == VALUES.shape
    np.testing.assert_array_equal(lazy.read().astype(np.float32), whole)
    for region in (
        (1,),
        (slice(0, 3), slice(1, 4)),
        (slice(1, 3), 2, slice(30, 300)),
        (slice(0, 3), slice(0, 5), slice(511, 512)),
    ):
        got = lazy.read(region).astype(np.float32)
        np.testing.assert_array_equal(got.reshape(-1), whole[region].reshape(-1))
    stored = tensors.stored("x.weight")
    np.testing.assert_array_equal(
        stored.read().view(np.uint8).reshape(-1), quantize(VALUES, kind).reshape(-1)
    )
    assert [p for p, _, _ in lazy.spans()] == [tmp_path / "x.gguf"]


def test_big_endian_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="big-endian"):
        one_tensor(tmp_path / "x.gguf", "F32", big_endian=True)


def collect(values: np.ndarray, encodings: list[Encoding], limit: int) -> list[np.ndarray]:
    out = []
    for payload in encoded(from_array(values), "x", encodings):
        data = np.zeros(payload.nbytes, np.uint8)
        for slab in payload.slabs(limit):
            data[slab.at : slab.at + slab.nbytes] = np.asarray(slab.make()).reshape(-1)
        out.append(data)
    return out


@given(st.sampled_from([1, 3000, 9000, 40000, 10**7]))
@settings(max_examples=20, deadline=None)
def test_each_matrix_meets_its_own_importance(limit: int) -> None:
    weights = np.random.default_rng(1).random((3, 512)).astype(np.float32)
    kinds = [type_by_name("Q4_K"), type_by_name("F16"), type_by_name("Q8_0")]
    encodings = [Encoding(kinds[0], weights), Encoding(kinds[1]), Encoding(kinds[2])]
    expected = [
        np.stack([quantize(x, kinds[0], w) for x, w in zip(VALUES, weights, strict=True)]),
        quantize(VALUES, kinds[1]),
        quantize(VALUES, kinds[2]),
    ]
    for got, want in zip(collect(VALUES, encodings, limit), expected, strict=True):
        np.testing.assert_array_equal(got, want.reshape(-1))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_values_are_found_where_they_are(dtype: type, value: float) -> None:
    x = np.zeros((700, 512), dtype)
    assert not_finite(x) is None
    x[612, 7] = value
    assert not_finite(x) == (612, 7)
    with pytest.raises(
        QuantError, match=r"tensor 'x', row 612, column 7: the value is -?(nan|inf)"
    ):
        collect(x, [Encoding(type_by_name("Q4_K"))], 40000)


def test_overflow_names_the_tensor() -> None:
    x = np.full((4, 32), 1e6, np.float32)
    with pytest.raises(QuantError, match=r"tensor 'x', rows 0 to 3: .*float16"):
        collect(x, [Encoding(type_by_name("F16"))], 1 << 20)


def test_other_dtypes_are_cast() -> None:
    x = VALUES[0].astype(np.float64)
    (got,) = collect(x, [Encoding(type_by_name("Q8_0"))], 1 << 20)
    np.testing.assert_array_equal(got, quantize(VALUES[0], "Q8_0").reshape(-1))


def test_cutting_by_size() -> None:
    tensors = [
        OutTensor(TensorSpec(str(n), (n,), 24, n), BytesPayload(bytes(n))) for n in (10, 60, 200, 5)
    ]
    sizes = [[t.spec.nbytes for t in shard] for shard in cut_by_size(tensors, 100)]
    assert sizes == [[10, 60], [200], [5]]
    assert len(cut_by_size(tensors, None)) == 1
    assert shard_name("m.gguf", 1, 3) == "m-00002-of-00003.gguf"
