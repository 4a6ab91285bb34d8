"""Quantized checkpoints: each kind packed here by its definition, decoded by the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mconv.errors import MconvError
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.dequant import dequantized
from mconv.shardio.tensor import LazyTensor, from_array

F8 = ml_dtypes.float8_e4m3fn
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
RNG = np.random.default_rng(11)
Arrays = dict[str, np.ndarray]


def _open(arrays: Arrays, settings: dict[str, Any], dtype: str = "float32") -> Checkpoint:
    weights = {n: from_array(a) for n, a in arrays.items()}
    config = {"model_type": "llama", "dtype": dtype, "quantization_config": settings}
    return dequantized(Checkpoint(path=Path("x"), format="hf", weights=weights, config=config))


def _check(tensor: LazyTensor, expected: np.ndarray) -> None:
    """The whole, and regions of it, bit for bit."""
    assert tensor.shape == expected.shape
    whole = tensor.read()
    assert np.array_equal(whole, expected)
    for _ in range(10):
        cut = [slice(*sorted(RNG.integers(0, n + 1, 2))) for n in expected.shape]
        assert np.array_equal(tensor.read(cut), expected[tuple(cut)]), cut


def _stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack along dim 0 into one little-endian stream of bits, by big integers."""
    out = []
    for column in values.T:
        number = sum(int(v) << (bits * k) for k, v in enumerate(column))
        out.append(np.frombuffer(number.to_bytes(len(column) * bits // 8, "little"), "<i4"))
    return np.stack(out, axis=1)


# -- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 384), (200, 130)])
def test_fp8_blocks(shape: tuple[int, int]) -> None:
    weight = RNG.standard_normal(shape).astype(F8)
    scale = RNG.random((-(-shape[0] // 128), -(-shape[1] // 128))).astype(np.float32)
    spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: shape[0], : shape[1]]
    made = _open(
        {"a.weight": weight, "a.weight_scale_inv": scale, "n.weight": np.ones(4, np.float32)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    assert sorted(made.weights) == ["a.weight", "n.weight"]
    assert "quantization_config" not in (made.config or {})
    _check(made.weights["a.weight"], weight.astype(np.float32) * spread)


@pytest.mark.parametrize("shape", [(), (1,), (40,), (40, 1), (40, 3)])
def test_fp8_other_scales(shape: tuple[int, ...]) -> None:
    weight = RNG.standard_normal((40, 48)).astype(F8)
    scale = RNG.random(shape).astype(np.float32)
    grid = scale.reshape((-1, 1)) if scale.ndim < 2 else np.repeat(scale, 48 // scale.shape[1], 1)
    arrays = {"a.weight": weight, "a.weight_scale": scale, "a.input_scale": np.ones(1, np.float32)}
    made = _open(arrays, {"quant_method": "compressed-tensors"})
    assert list(made.weights) == ["a.weight"]
    _check(made.weights["a.weight"], weight.astype(np.float32) * grid)


def test_int8_rows() -> None:
    weight = RNG.integers(-127, 128, (6, 10)).astype(np.int8)
    scb = RNG.random(6).astype(np.float32)
    arrays = {"a.weight": weight, "a.SCB": scb, "a.weight_format": np.zeros(1, np.uint8)}
    made = _open(arrays, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    expected = weight.astype(np.float32) * (scb / np.float32(127))[:, None]
    _check(made.weights["a.weight"], expected)


def test_rounded_once_to_the_models_type() -> None:
    weight = RNG.standard_normal((40, 48)).astype(F8)
    scale = RNG.random((40, 1)).astype(np.float32)
    made = _open({"a.weight": weight, "a.weight_scale": scale}, {}, "bfloat16")
    expected = (weight.astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
    assert made.weights["a.weight"].read().tobytes() == expected.tobytes()


# -- packed integers ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(bits: int, act_order: bool, version: str) -> None:
    inputs, outputs, group = 128, 64, 32
    q = RNG.integers(0, 1 << bits, (inputs, outputs))
    zeros = RNG.integers(1, 1 << bits, (inputs // group, outputs))
    scales = RNG.random((inputs // group, outputs)).astype(np.float16)
    g_idx = np.arange(inputs, dtype=np.int32) // group
    if act_order:
        g_idx = RNG.permutation(g_idx)
    stored = zeros - (1 if version == "gptq" else 0)
    arrays = {
        "a.qweight": _stream(q, bits), "a.qzeros": _stream(stored.T, bits).T.copy(),
        "a.scales": scales, "a.g_idx": g_idx, "a.bias": np.ones(outputs, np.float16),
    }  # fmt: skip
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group,
                "checkpoint_format": version}  # fmt: skip
    made = _open(arrays, settings)
    assert sorted(made.weights) == ["a.bias", "a.weight"]
    expected = (q - zeros[g_idx]).astype(np.float32) * scales.astype(np.float32)[g_idx]
    _check(made.weights["a.weight"], expected.T)


def test_awq() -> None:
    inputs, outputs, group = 64, 40, 16
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: value order[k] lies at bits 4k

    def pack(values: np.ndarray) -> np.ndarray:
        words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for k, place in enumerate(order):
            words |= values[:, place::8].astype(np.uint32) << np.uint32(4 * k)
        return words.view(np.int32)

    q = RNG.integers(0, 16, (inputs, outputs))
    zeros = RNG.integers(0, 16, (inputs // group, outputs))
    scales = RNG.random((inputs // group, outputs)).astype(np.float16)
    arrays = {"a.qweight": pack(q), "a.qzeros": pack(zeros), "a.scales": scales}
    made = _open(arrays, {"quant_method": "awq", "bits": 4, "group_size": group})
    spread = np.repeat(scales.astype(np.float32), group, 0)
    expected = (q - np.repeat(zeros, group, 0)).astype(np.float32) * spread
    _check(made.weights["a.weight"], expected.T)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_pack_quantized(bits: int, asymmetric: bool) -> None:
    rows, columns, group, per = 24, 64, 16, 32 // bits

    def pack(values: np.ndarray) -> np.ndarray:
        words = np.zeros((values.shape[0], values.shape[1] // per), np.uint32)
        for k in range(per):
            words |= values[:, k::per].astype(np.uint32) << np.uint32(bits * k)
        return words.view(np.int32)

    half = 1 << (bits - 1)
    q = RNG.integers(-half, half, (rows, columns))
    scale = RNG.random((rows, columns // group)).astype(np.float32)
    zero = RNG.integers(-half, half, (rows, columns // group))
    arrays = {"a.weight_packed": pack(q + half), "a.weight_scale": scale,
              "a.weight_shape": np.array([rows, columns], np.int64)}  # fmt: skip
    if asymmetric:
        arrays["a.weight_zero_point"] = pack((zero + half).T).T.copy()
    groups = {"group_0": {"weights": {"num_bits": bits}}}
    made = _open(arrays, {"quant_method": "compressed-tensors", "config_groups": groups})
    centre = np.repeat(zero, group, 1) if asymmetric else 0
    _check(made.weights["a.weight"], (q - centre).astype(np.float32) * np.repeat(scale, group, 1))


# -- four-bit floats ------------------------------------------------------------------------------


def test_mxfp4_as_in_transformers() -> None:
    blocks = RNG.integers(0, 256, (3, 10, 4, 16)).astype(np.uint8)
    scales = RNG.integers(100, 140, (3, 10, 4)).astype(np.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    made = _open(
        {
            f"{name}_blocks": blocks,
            f"{name}_scales": scales,
            f"{name}_bias": np.ones(3, np.float32),
        },
        {"quant_method": "mxfp4"},
    )
    assert sorted(made.weights) == [name, f"{name}_bias"]
    value = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], -1).reshape(3, 10, 4, 32)
    value = value * np.exp2(scales.astype(np.float32) - 127)[..., None]
    expected = value.reshape(3, 10, 128).transpose(0, 2, 1)
    _check(made.weights[name], expected)
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    theirs = mxfp4.convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    assert np.array_equal(made.weights[name].read(), theirs.numpy())


@pytest.mark.parametrize("kind", ["compressed-tensors", "modelopt"])
def test_nvfp4(kind: str) -> None:
    packed = RNG.integers(0, 256, (12, 32)).astype(np.uint8)
    scale = np.abs(RNG.standard_normal((12, 4))).astype(F8)
    factor = np.array([3.0], np.float32)
    value = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], -1).reshape(12, 64)
    if kind == "modelopt":
        arrays = {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": factor}
        whole = scale.astype(np.float32) * factor
    else:
        arrays = {"a.weight_packed": packed, "a.weight_scale": scale,
                  "a.weight_global_scale": factor}  # fmt: skip
        whole = scale.astype(np.float32) / factor
    made = _open(arrays, {"quant_method": kind})
    _check(made.weights["a.weight"], value * np.repeat(whole, 16, 1))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(40, 64), (7, 50)])
def test_nf4(nested: bool, shape: tuple[int, int]) -> None:
    size = shape[0] * shape[1]
    codes = RNG.integers(0, 16, size + size % 2)
    blocks = -(-size // 64)
    table = np.sort(RNG.standard_normal(16)).astype(np.float32)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": list(shape),
                             "dtype": "bfloat16"}  # fmt: skip
    arrays = {"a.weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
              "a.weight.quant_map": table}  # fmt: skip
    if nested:
        small = RNG.integers(0, 256, blocks).astype(np.uint8)
        inner = RNG.random(256).astype(np.float32)
        outer = RNG.random(-(-blocks // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}
        arrays |= {"a.weight.absmax": small, "a.weight.nested_absmax": outer,
                   "a.weight.nested_quant_map": inner}  # fmt: skip
        absmax = inner[small] * outer[np.arange(blocks) // 256] + np.float32(0.25)
    else:
        absmax = arrays["a.weight.absmax"] = RNG.random(blocks).astype(np.float32)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    arrays["a.weight.quant_state.bitsandbytes__nf4"] = text
    made = _open(arrays, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    expected = table[codes[:size]] * np.repeat(absmax, 64)[:size]
    _check(made.weights["a.weight"], expected.reshape(shape))


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "settings"),
    [
        ({"a.weight_scale_inv": (2, 2)}, {"quant_method": "fp8"}),
        ({"a.qweight": (16, 64), "a.scales": (4, 64)},
         {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        ({"a.qweight": (16, 64), "a.qzeros": (4, 9), "a.scales": (4, 64)},
         {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        ({"a.qweight": (16, 64), "a.qzeros": (4, 8), "a.scales": (4, 64)},
         {"quant_method": "gptq", "bits": 5, "group_size": 32}),
        ({"a.qweight": (16, 64), "a.qzeros": (4, 8), "a.scales": (4, 64)},
         {"quant_method": "gptq", "group_size": 32}),
        ({"a.qweight": (16, 64), "a.qzeros": (4, 8), "a.scales": (4, 64)},
         {"quant_method": "awq", "group_size": 16}),
        ({"a.weight": (8, 1), "a.weight.absmax": (1,)}, {"quant_method": "bitsandbytes"}),
        ({"e_blocks": (2, 3, 4, 15), "e_scales": (2, 3, 4)}, {"quant_method": "mxfp4"}),
    ],
)  # fmt: skip
def test_what_does_not_fit(arrays: dict[str, tuple[int, ...]], settings: dict[str, Any]) -> None:
    with pytest.raises(MconvError):
        _open({n: np.zeros(s, np.int32) for n, s in arrays.items()}, settings)


def test_plain_checkpoints_stay_as_they_are() -> None:
    arrays = {"a.weight": np.ones((2, 2), np.float32)}
    made = _open(arrays, {"quant_method": "something new"})
    assert "quantization_config" in (made.config or {})
