"""Streaming comparison against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from mconv.errors import FormatError
from mconv.shardio.compare import check_replicas, compare, same
from mconv.shardio.dtypes import BFLOAT16
from mconv.shardio.tensor import from_array


def test_counts_and_sizes_of_differences() -> None:
    a = np.linspace(-4, 4, 1000, dtype=np.float32).reshape(10, 100)
    b = a.copy()
    b[3, 5] += 0.5
    b[9, 9] -= 2
    d = compare("w", from_array(a), from_array(b))
    assert (d.different, d.size, d.equal) == (2, 1000, False)
    assert d.max_abs == pytest.approx(2)
    assert d.max_rel == pytest.approx(0.5)


def test_equal_values_of_different_dtypes_are_equal() -> None:
    a = np.arange(-8, 8, dtype=np.float32)
    assert compare("w", from_array(a), from_array(a.astype(BFLOAT16))).equal
    assert not same(from_array(a), from_array(a.astype(BFLOAT16)))


def test_nan_equals_nan_but_not_a_number() -> None:
    a = np.array([1, np.nan, np.inf], np.float32)
    assert compare("w", from_array(a), from_array(a)).equal
    assert compare("w", from_array(a), from_array(a.astype(np.float64))).equal
    d = compare("w", from_array(a), from_array(np.array([1, 2, np.inf], np.float32)))
    assert d.different == 1
    assert d.max_abs == np.inf


def test_negative_zero_is_another_bit_pattern_but_an_equal_value() -> None:
    a, b = from_array(np.zeros(3, np.float32)), from_array(-np.zeros(3, np.float32))
    assert compare("w", a, b).equal
    assert not same(a, b)


def test_a_replica_that_differs_is_named() -> None:
    good, bad = np.zeros(5, np.float32), np.ones(5, np.float32)
    weights = {"norm": from_array(good, "rank0")}
    check_replicas(weights, {"norm": (from_array(good, "rank1"),)})
    with pytest.raises(FormatError, match=r"norm: the copy in <rank1> differs"):
        check_replicas(weights, {"norm": (from_array(bad, "rank1"),)})
