"""Weights quantized by the tools that define the formats decode to what those tools decode them to.

compressed-tensors and bitsandbytes run on the CPU; each test is skipped where its tool is not
installed. transformers holds the definitions of BitNet's packing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.dequant import dequantized
from mconv.shardio.tensor import from_array

torch = pytest.importorskip("torch")


def _array(tensor: Any) -> np.ndarray:
    import ml_dtypes

    kinds = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
    kind = kinds.get(tensor.dtype)
    if kind is None:
        return np.asarray(tensor.detach().numpy())
    bits = torch.uint8 if tensor.dtype.itemsize == 1 else torch.int16
    return np.asarray(tensor.detach().view(bits).numpy()).view(kind)


def _decoded(parts: dict[str, Any], settings: dict[str, Any]) -> np.ndarray:
    """Open one layer's tensors, in float32."""
    weights = {f"a.{name}": from_array(_array(t.contiguous())) for name, t in parts.items()}
    config = {"model_type": "llama", "dtype": "float32", "quantization_config": settings}
    ckpt = Checkpoint(path=Path("x"), format="hf", weights=weights, config=config)
    return dequantized(ckpt).weights["a.weight"].read()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (7, 50)])
def test_bitsandbytes_four_bits(kind: str, nested: bool, shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(3)
    weight = torch.randn(shape)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    parts = {"weight": packed}
    parts |= {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    theirs = functional.dequantize_4bit(packed, state)
    assert np.array_equal(_decoded(parts, settings), _array(theirs))


def test_bitsandbytes_eight_bits() -> None:
    """Their own formulas, ``x / 127`` and ``x * (1 / 127)``, differ by a rounding."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(4)
    codes, stats, _ = functional.int8_vectorwise_quant(torch.randn(48, 64).half())
    theirs = functional.int8_vectorwise_dequant(codes, stats)
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    mine = _decoded({"weight": codes, "SCB": stats}, settings)
    assert np.allclose(mine, _array(theirs), rtol=3e-7, atol=0)


def _compressor(name: str, **arguments: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return a format's compressor, its scheme and what config.json says of it."""
    base = pytest.importorskip("compressed_tensors.compressors.base")
    pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments), format=name
    )
    group = {"weights": scheme.weights.model_dump(), "targets": ["Linear"]}
    settings = {"quant_method": "compressed-tensors", "format": name,
                "config_groups": {"group_0": group}}  # fmt: skip
    return base.BaseCompressor.get_value_from_registry(name), scheme, settings


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_pack_quantized(bits: int, symmetric: bool, group: int | None) -> None:
    strategy = "group" if group else "channel"
    tool, scheme, settings = _compressor(
        "pack-quantized", num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group
    )
    torch.manual_seed(5)
    weight, half = torch.randn(24, 96), 1 << (bits - 1)
    count = 96 // group if group else 1
    zero = torch.zeros(24, count, dtype=torch.int8)
    if not symmetric:
        zero = torch.randint(-half, half, (24, count), dtype=torch.int8)
    state = {"weight": weight, "weight_zero_point": zero,
             "weight_scale": torch.rand(24, count) * 4 / half + 0.05}  # fmt: skip
    packed = tool.compress(state, scheme)
    theirs = tool.decompress(packed, scheme)["weight"]
    assert np.array_equal(_decoded(packed, settings), _array(theirs.float()))


@pytest.mark.parametrize("name", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_four_bit_floats(name: str) -> None:
    size = 16 if name.startswith("nv") else 32
    tool, scheme, settings = _compressor(
        name, num_bits=4, type="float", symmetric=True, group_size=size,
        strategy="tensor_group" if size == 16 else "group",
        scale_dtype=torch.float8_e4m3fn if size == 16 else torch.uint8,
    )  # fmt: skip
    torch.manual_seed(6)
    weight = torch.randn(24, 128)
    scale = torch.rand(24, 128 // size) + 0.25
    state = {"weight": weight, "weight_scale": scale}
    if size == 16:
        state = {"weight": weight, "weight_scale": (scale * 100).to(torch.float8_e4m3fn).float(),
                 "weight_global_scale": torch.tensor([128.0])}  # fmt: skip
    else:
        state["weight_scale"] = torch.exp2(torch.floor(torch.log2(scale)))
    packed = tool.compress(state, scheme)
    theirs = tool.decompress(packed, scheme)["weight"]
    assert np.array_equal(_decoded(packed, settings), _array(theirs.float()))


@pytest.mark.parametrize("linear", ["bitlinear", "autobitlinear"])
def test_bitnet_of_transformers(linear: str) -> None:
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    torch.manual_seed(7)
    codes = torch.randint(-1, 2, (48, 64))
    packed = bitnet.pack_weights(codes)
    scale = torch.tensor([0.375])
    whole = bitnet.unpack_weights(packed, torch.float32)
    theirs = whole / scale if linear == "bitlinear" else whole * scale
    settings = {"quant_method": "bitnet", "linear_class": linear}
    mine = _decoded({"weight": packed, "weight_scale": scale}, settings)
    assert np.allclose(mine, _array(theirs), rtol=1e-7, atol=0)
