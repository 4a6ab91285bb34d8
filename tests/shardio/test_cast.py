"""Casts against ml_dtypes, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from mconv.shardio.cast import narrow_bf16, widen_bf16
from mconv.shardio.tensor import from_array


def test_narrow_rounds_like_ml_dtypes() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    ours, theirs = narrow_bf16(x), x.astype(ml_dtypes.bfloat16)
    real = ~np.isnan(x)
    np.testing.assert_array_equal(ours.view(np.uint16)[real], theirs.view(np.uint16)[real])
    assert np.isnan(ours[~real].astype(np.float32)).all()


def test_widen_is_exact_for_every_value() -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(widen_bf16(x).view(np.uint32) >> 16, x.view(np.uint16))


def test_lazy_cast_keeps_the_shape_and_changes_the_dtype() -> None:
    x = np.array([[1.0, 2.5], [-3.25, 1e-3]], np.float32)
    lazy = from_array(x).cast(np.dtype(ml_dtypes.bfloat16))
    assert lazy.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        lazy.read().astype(np.float32), x.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
