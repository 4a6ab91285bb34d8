"""Quantized Hugging Face checkpoints as plain weights, decoded when they are read.

``quantization_config`` of config.json says how; names say where: each quantized ``weight`` and the
tensors beside it become one lazy ``weight``. The result has a config without quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from ...errors import ConfigError, FormatError
from .. import dtypes
from ..checkpoint import Checkpoint
from ..tensor import LazyTensor
from .bitnet import bitnet
from .bnb import four_bit
from .coded import Coded, Codes, Floats, Integers
from .fp4 import mxfp4, nvfp4, packed_mxfp4
from .packed import awq, gptq, pack_quantized
from .scaled import scaled

__all__ = ["DECODED", "Coded", "Codes", "Floats", "Integers", "dequantized"]

#: How the warning begins, after a number, that says that weights are decoded.
DECODED = " tensors are dequantized ("

_BF16 = np.dtype(ml_dtypes.bfloat16)
_FP8 = tuple(np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
_SIDE = (
    "weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_packed",
    "weight_zero_point", "weight_shape", "weight_g_idx", "qweight", "qzeros", "scales", "g_idx",
    "SCB",
)  # fmt: skip
_ACTIVATIONS = ("input_scale", "input_global_scale", "k_scale", "v_scale", "output_scale",
                "weight_format", "activation_scale")  # fmt: skip
_BNB = ".weight."
_INPUT = "input_scale"
_INT8 = -128, 127

Parts = dict[str, LazyTensor]


def dequantized(ckpt: Checkpoint, dtype: np.dtype | None = None) -> Checkpoint:
    """Return the checkpoint with plain weights; itself where it is not quantized.

    Args:
        ckpt: the checkpoint.
        dtype: of the weights that are decoded; None: the one the model computes in.

    Raises:
        FormatError: tensors missing or of shapes that do not fit each other.
        ConfigError: settings that make no sense.
    """
    settings = (ckpt.config or {}).get("quantization_config")
    if ckpt.config is None or not isinstance(settings, Mapping):
        return ckpt
    dtype = _dtype(ckpt.config) if dtype is None else dtype
    modules, weights, dropped = _grouped(ckpt.weights)
    for module, parts in modules.items():
        tensor = _decode(module, parts, settings, dtype)
        if tensor is not None:
            weights[f"{module}.weight"] = tensor
            continue
        parts.pop(_INPUT, None)
        weights |= {f"{module}.{part or 'weight'}": t for part, t in parts.items()}
    weights, experts = _expert_blocks(weights, dtype)
    count = len(modules) + experts
    if not count:
        return ckpt
    config = {k: v for k, v in ckpt.config.items() if k != "quantization_config"}
    method = settings.get("quant_method")
    notes = [f"{count}{DECODED}{method}) to {dtype.name} as they are read"]
    if dropped:
        notes.append(f"{dropped} scales of activations are left out")
    copies = {n: c for n, c in ckpt.replicas.items() if ckpt.weights.get(n) is weights.get(n)}
    return replace(
        ckpt, weights=weights, config=config, replicas=copies, warnings=(*ckpt.warnings, *notes)
    )


def _dtype(config: Mapping[str, Any]) -> np.dtype:
    """The type the model computes in; FP8 and the like name none, then bfloat16."""
    name = config.get("dtype") or config.get("torch_dtype")
    known = isinstance(name, str) and name in ("float32", "float16", "bfloat16")
    return dtypes.from_torch(str(name)) if known else _BF16


def _grouped(
    tensors: Mapping[str, LazyTensor],
) -> tuple[dict[str, Parts], dict[str, LazyTensor], int]:
    """Return ({module: {part: tensor}} of quantized modules, other tensors, dropped ones)."""
    modules: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in _SIDE:
            modules.setdefault(module, {})[part] = tensor
        elif _BNB in name:
            module, _, part = name.partition(_BNB)
            modules.setdefault(module, {})[part] = tensor
    weights: dict[str, LazyTensor] = {}
    dropped = 0
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in _SIDE or _BNB in name:
            continue
        if part == "weight" and module in modules:
            modules[module][""] = tensor
        elif part in _ACTIVATIONS:
            dropped += 1
            if module in modules and part in (_INPUT, "input_global_scale"):
                modules[module][_INPUT] = tensor
        else:
            weights[name] = tensor
    return modules, weights, dropped


def _decode(
    module: str, parts: Parts, settings: Mapping[str, Any], dtype: np.dtype
) -> LazyTensor | None:
    """Return the plain weight; None where the parts are nothing that is known."""
    name = f"{module}.weight"
    method = settings.get("quant_method")
    try:
        if "qweight" in parts:
            return _words(name, parts, settings, dtype)
        if "weight_packed" in parts:
            return _compressed(name, parts, settings, dtype)
        if "absmax" in parts:
            return four_bit(name, parts, dtype)
        weight = parts.get("")
        if weight is None:
            raise FormatError(f"{name}: is missing, but {', '.join(parts)} are there")
        if "SCB" in parts and weight.dtype == np.int8:
            scale = parts["SCB"].cast(np.dtype(np.float32)).map(lambda x: x / np.float32(127))
            return scaled(name, weight, scale, dtype, levels=_INT8)
        if "weight_scale_2" in parts and weight.dtype == np.uint8:
            scale, factor = parts["weight_scale"], parts["weight_scale_2"]
            return nvfp4(
                name, weight, scale, factor, dtype, divide=False, input_factor=parts.get(_INPUT)
            )
        found = parts.get("weight_scale_inv", parts.get("weight_scale"))
        if found is not None and weight.dtype == np.uint8 and method == "bitnet":
            divide = settings.get("linear_class") != "autobitlinear"
            return bitnet(name, weight, found, dtype, divide=divide)
        if found is None or weight.dtype not in (*_FP8, np.dtype(np.int8)):
            return None
        scale = found
        block = _block_size(settings) if "weight_scale_inv" in parts else None
        zero = parts.get("weight_zero_point")
        return scaled(
            name, weight, scale, dtype, block=block if scale.size > 1 else None, zero=zero,
            levels=_INT8 if weight.dtype == np.int8 else None,
        )  # fmt: skip
    except KeyError as e:
        raise FormatError(f"{name}: {e.args[0]} is missing") from e


def _block_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    size = settings.get("weight_block_size")
    if size is None:
        return None
    if not isinstance(size, list | tuple) or [type(n) for n in size] != [int, int]:
        raise ConfigError(f"quantization_config: weight_block_size is {size!r}, not two integers")
    return size[0], size[1]


def _words(
    name: str, parts: Parts, settings: Mapping[str, Any], dtype: np.dtype
) -> LazyTensor | None:
    group = _number(settings, "group_size", "q_group_size")
    kind = settings.get("quant_method")
    if kind == "awq":
        return awq(name, parts, dtype, group)
    if kind == "gptq":
        v2 = settings.get("checkpoint_format") == "gptq_v2"
        return gptq(name, parts, dtype, _number(settings, "bits"), group, v2=v2)
    return None


def _compressed(
    name: str, parts: Parts, settings: Mapping[str, Any], dtype: np.dtype
) -> LazyTensor:
    packed = parts["weight_packed"]
    if packed.dtype == np.uint8:
        scale = parts["weight_scale"]
        if scale.dtype == np.uint8:
            return packed_mxfp4(name, packed, scale, dtype)
        factor, of_input = parts["weight_global_scale"], parts.get(_INPUT)
        return nvfp4(name, packed, scale, factor, dtype, divide=True, input_factor=of_input)
    groups = settings.get("config_groups")
    first: object = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
    return pack_quantized(name, parts, dtype, bits if isinstance(bits, int) else 4)


def _number(settings: Mapping[str, Any], *keys: str) -> int:
    value = next((settings[k] for k in keys if k in settings), None)
    if type(value) is not int:
        raise ConfigError(f"quantization_config: {keys[0]} is {value!r}, expected an integer")
    return value


def _expert_blocks(
    tensors: dict[str, LazyTensor], dtype: np.dtype
) -> tuple[dict[str, LazyTensor], int]:
    """Replace ``<name>_blocks`` and ``<name>_scales`` by ``<name>``."""
    out: dict[str, LazyTensor] = {}
    count = 0
    for name, tensor in tensors.items():
        stem = name.removesuffix("_blocks")
        scales = f"{name.removesuffix('_scales')}_blocks"
        if stem != name and f"{stem}_scales" in tensors:
            out[stem] = mxfp4(stem, tensor, tensors[f"{stem}_scales"], dtype)
            count += 1
        elif not (name.endswith("_scales") and scales in tensors):
            out[name] = tensor
    return out, count
