"""Tiny models whose weights are quantized by the definitions of each format, with the exact values.

Codes and scales are drawn at random, stored as the format's own tools store them, and multiplied
out here in float64: nothing of the package is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 2}  # fmt: skip
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
_SPREAD = 0.05  # standard deviation of the weights, about


@dataclass(frozen=True, slots=True)
class Kind:
    """A quantized format: settings of config.json, and how a matrix is stored.

    ``make`` gets a generator and [outputs, inputs], and gives the tensors and the exact values.
    """

    settings: dict[str, Any]
    make: Callable[[np.random.Generator, int, int], tuple[Arrays, np.ndarray]]
    types: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack along dim 0 into one little-endian stream of bits, int32 [n * bits / 32, columns]."""
    flags = values[:, None, :] >> np.arange(bits)[None, :, None] & 1
    flags = flags.reshape(-1, values.shape[1]).astype(np.uint8)
    data = np.packbits(flags, axis=0, bitorder="little")
    return np.ascontiguousarray(data.T).view("<i4").T.copy()


def awq_words(values: np.ndarray) -> np.ndarray:
    """Pack along dim 1 in AutoAWQ's order."""
    out = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for k, place in enumerate(_AWQ):
        out |= values[:, place::8].astype(np.uint32) << np.uint32(4 * k)
    return out.view(np.int32)


def _scales(rng: np.random.Generator, shape: tuple[int, ...], steps: int) -> np.ndarray:
    return (rng.uniform(0.5, 1.5, shape) * _SPREAD * 4 / steps).astype(np.float16)


def gptq(
    bits: int, *, symmetric: bool = True, act_order: bool = False, powers: bool = False
) -> Kind:
    """GPTQ in groups of 64; ``powers``: scales are powers of two."""

    def make(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray]:
        q = rng.integers(0, 1 << bits, (columns, rows))
        scale = _scales(rng, (columns // 64, rows), 1 << bits)
        if powers:
            scale = np.exp2(np.floor(np.log2(scale.astype(np.float32)))).astype(np.float16)
        zero = np.full(scale.shape, 1 << (bits - 1))
        if not symmetric:
            zero = rng.integers(1, 1 << bits, scale.shape)
        group = np.arange(columns) // 64
        if act_order:
            group = rng.permutation(group)
        exact = (q - zero[group]) * scale.astype(np.float64)[group]
        return {
            "qweight": words(q, bits), "qzeros": words(zero.T - 1, bits).T.copy(),
            "scales": scale, "g_idx": group.astype(np.int32),
        }, exact.T  # fmt: skip

    settings = {"quant_method": "gptq", "bits": bits, "group_size": 64, "sym": symmetric,
                "desc_act": act_order, "checkpoint_format": "gptq"}  # fmt: skip
    best = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 8: "Q8_0"}[bits]
    kept = best if symmetric else "Q4_1" if powers else "Q5_0"
    return Kind(settings, make, () if act_order else (kept,))


def _awq(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray]:
    q, scale = rng.integers(0, 16, (columns, rows)), _scales(rng, (columns // 128, rows), 16)
    zero = rng.integers(0, 16, scale.shape)
    exact = (q - np.repeat(zero, 128, 0)) * np.repeat(scale.astype(np.float64), 128, 0)
    return {"qweight": awq_words(q), "qzeros": awq_words(zero), "scales": scale}, exact.T


def _rounded(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)


def packed(bits: int) -> Kind:
    """compressed-tensors ``pack-quantized``, symmetric, groups of 32, bfloat16 scales."""

    def make(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray]:
        half = 1 << (bits - 1)
        q = rng.integers(-half, half, (rows, columns))
        scale = _rounded(_scales(rng, (rows, columns // 32), 2 * half))
        exact = q * np.repeat(scale.double().numpy(), 32, 1)
        return {
            "weight_packed": words((q + half).T, bits).T.copy(), "weight_scale": scale,
            "weight_shape": np.array([rows, columns], np.int64),
        }, exact  # fmt: skip

    return Kind(_groups("pack-quantized", bits, "group", 32), make, ("Q8_0",) if bits == 8
                else ("Q4_0",))  # fmt: skip


def _groups(name: str, bits: int, strategy: str, size: int | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "strategy": strategy, "group_size": size, "symmetric": True,
               "type": "float" if "fp4" in name else "int"}  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "format": name}
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": {"g": group}}


def _int8(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray]:
    q = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    scale = _rounded(_scales(rng, (rows, 1), 256))
    return {"weight": q, "weight_scale": scale}, q * scale.double().numpy()


def _bnb8(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray]:
    q = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    scb = rng.uniform(0.5, 1.0, rows).astype(np.float32)
    return {"weight": q, "SCB": scb}, q * (scb / np.float32(127)).astype(np.float64)[:, None]


def _fp4(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    codes = rng.integers(0, 16, (rows, columns))
    return (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8), E2M1[codes]


def nvfp4(producer: str) -> Kind:
    """NVFP4 of ``modelopt`` or ``compressed-tensors``; every third weight has a factor of 1."""
    theirs = producer == "modelopt"

    def make(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray]:
        import torch

        data, value = _fp4(rng, rows, columns)
        factor = np.float32(rng.choice([0.0625, 1.0, 0.09]))
        raw = rng.uniform(0.2, 2.0, (rows, columns // 16)).astype(np.float32)
        scale = torch.from_numpy(raw * np.float32(_SPREAD / 3) / factor).to(torch.float8_e4m3fn)
        stored = factor if theirs else np.float32(1) / factor
        whole = stored if theirs else np.float32(1) / stored
        exact = value * np.repeat(scale.float().double().numpy(), 16, 1) * np.float64(whole)
        names = ("weight", "weight_scale", "weight_scale_2", "input_scale")
        if not theirs:
            names = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
        at_input = rng.uniform(0.1, 2.0, 1).astype(np.float32)
        parts = (data, scale, np.array(stored).reshape(1), at_input)
        return dict(zip(names, parts, strict=True)), exact

    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    if not theirs:
        settings = _groups("nvfp4-pack-quantized", 4, "tensor_group", 16)
    return Kind(settings, make, ("NVFP4",))


def _mxfp4(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray]:
    data, value = _fp4(rng, rows, columns)
    scale = rng.integers(118, 122, (rows, columns // 32)).astype(np.uint8)
    exact = value * np.repeat(np.exp2(scale.astype(np.float64) - 127), 32, 1)
    return {"weight_packed": data, "weight_scale": scale}, exact


def bitnet(linear: str) -> Kind:
    """Packed ternary weights of transformers' BitNet layers."""

    def make(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray]:
        q = rng.integers(-1, 2, (rows, columns))
        quarters = (q + 1).reshape(4, rows // 4, columns)
        data = sum(quarters[k] << (2 * k) for k in range(4)).astype(np.uint8)
        scale = _rounded(rng.uniform(1, 2, 1) * (1 / _SPREAD if linear == "bitlinear" else _SPREAD))
        whole = scale.float().numpy()
        if linear == "bitlinear":
            whole = np.float32(1) / whole
        return {"weight": data, "weight_scale": scale}, q * whole.astype(np.float64)

    settings = {"quant_method": "bitnet", "linear_class": linear, "quantization_mode": "offline"}
    return Kind(settings, make, ("TQ2_0",))


KINDS: dict[str, Kind] = {
    "gptq4": gptq(4),
    "gptq2": gptq(2),
    "gptq3": gptq(3),
    "gptq8": gptq(8),
    "gptq4-asymmetric": gptq(4, symmetric=False),
    "gptq4-powers": gptq(4, symmetric=False, powers=True),
    "gptq4-act-order": gptq(4, act_order=True),
    "awq": Kind({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, _awq,
                ("Q5_0",)),
    "packed4": packed(4),
    "packed8": packed(8),
    "int8": Kind(_groups("int-quantized", 8, "channel"), _int8, ("Q8_0",)),
    "bnb8": Kind({"quant_method": "bitsandbytes", "load_in_8bit": True}, _bnb8, ()),
    "nvfp4-modelopt": nvfp4("modelopt"),
    "nvfp4-compressed": nvfp4("compressed-tensors"),
    "mxfp4": Kind(_groups("mxfp4-pack-quantized", 4, "group", 32), _mxfp4, ("MXFP4",)),
    "bitnet": bitnet("bitlinear"),
    "bitnet-auto": bitnet("autobitlinear"),
}  # fmt: skip


def quantize_folder(plain: Path, folder: Path, kind: Kind, seed: int = 3) -> Path:
    """Write the model of ``plain`` with random quantized layers; return the exact one in F32.

    The exact one is a folder beside it, with the same small files.
    """
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    rng = np.random.default_rng(seed)
    exact_folder = folder.with_name(f"{folder.name}-exact")
    for one in (folder, exact_folder):
        shutil.copytree(plain, one)
    stored: dict[str, Any] = {}
    exact: dict[str, Any] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "_proj." not in name or tensor.ndim != 2:
            stored[name], exact[name] = tensor, tensor.float()
            continue
        arrays, values = kind.make(rng, *tensor.shape)
        module = name.removesuffix(".weight")
        for part, array in arrays.items():
            stored[f"{module}.{part}"] = torch.as_tensor(array).contiguous()
        exact[name] = torch.from_numpy(values.astype(np.float32)).contiguous()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(exact, exact_folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    plain_type = {"torch_dtype": "float32", "dtype": "float32"}
    (exact_folder / "config.json").write_text(json.dumps(config | plain_type))
    (folder / "config.json").write_text(
        json.dumps(config | kind.extra | {"quantization_config": kind.settings})
    )
    return exact_folder
