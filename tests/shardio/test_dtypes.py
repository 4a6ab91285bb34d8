"""The dtype table against torch and safetensors."""

from __future__ import annotations

import numpy as np
import pytest
from mconv.errors import ConfigError, UnsupportedError
from mconv.shardio import dtypes

NAMES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "uint8", "bool"]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_equal_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    assert dtypes.from_torch(f"torch.{name}").itemsize == getattr(torch, name).itemsize


@pytest.mark.parametrize("name", NAMES)
def test_safetensors_codes_round_trip(name: str) -> None:
    dtype = dtypes.from_torch(name)
    assert dtypes.from_safetensors(dtypes.to_safetensors(dtype)) == dtype
    assert dtypes.name(dtype) == name


def test_user_spellings() -> None:
    assert dtypes.parse("BF16") == dtypes.BFLOAT16
    assert dtypes.parse("f32") == np.dtype(np.float32)
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        dtypes.parse("bf166")
    with pytest.raises(UnsupportedError, match="qint8"):
        dtypes.from_torch("torch.qint8")


@pytest.mark.parametrize("spelling", ["f64", "f32", "fp16", "BF16"])
def test_weights_are_cast_to_wide_floats(spelling: str) -> None:
    assert dtypes.parse_cast(spelling) == dtypes.parse(spelling)


@pytest.mark.parametrize("spelling", ["int8", "bool", "u16", "fp8", "float8_e5m2", "complex64"])
def test_casts_that_would_lose_the_weights_are_refused(spelling: str) -> None:
    with pytest.raises(ConfigError, match="give f32, f16 or bf16"):
        dtypes.parse_cast(spelling)


def test_what_counts_as_a_float() -> None:
    assert dtypes.is_float(dtypes.BFLOAT16)
    assert dtypes.is_float(np.dtype(np.float64))
    assert not dtypes.is_float(np.dtype(np.int64))
