"""The pristine checkpoints that the fuzzer damages: fixtures, and more formats made on the spot.

Made are the targets of ``mconv reshard`` and ``mconv to-gguf`` (from the trained model of the
tests) and small quantized and MindSpore checkpoints, packed here by their definitions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from mconv.convert.reshard import reshard
from mconv.convert.to_gguf import to_gguf
from mconv.shardio import Layout, open_checkpoint
from mconv.shardio.safetensors_header import build_header

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = (
    "torch/*/ckpt*", "deepspeed/*/ckpt", "deepspeed/*/universal", "megatron/*/torch",
    "megatron/*/torch_dist", "megatron/*/zarr", "megatron/*/torch_dcp", "nanotron/*/ckpt*",
    "colossalai/*/ckpt*", "orbax/*/ckpt*", "tf/*/ckpt*",
)  # fmt: skip
LAYOUTS = (
    "hf:max_shard_size=100000", "hf-dcp:dp=2", "dcp:dp=2", "torch", "deepspeed-universal",
    "deepspeed:zero=1,dp=2", "deepspeed:zero=3,dp=3", "megatron:tp=2,pp=2",
    "megatron-dist:tp=2",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One pristine checkpoint.

    Attributes:
        folder: where it is.
        config: a config.json to give, or None.
        vocab_size: option for padded vocabularies.
        gguf: plan a GGUF too.
        tokenizer: where its tokenizer is, if not in it.
        adapter: folder below it of an adapter to merge; the base is then in ``base``.
    """

    folder: Path
    config: Path | None = None
    vocab_size: int | None = None
    gguf: bool = False
    tokenizer: Path | None = None
    adapter: str | None = None


def find_cases(fixtures: Path) -> list[Case]:
    """Return all checkpoints of the fixtures, and those that the tests bring along."""
    found = []
    for pattern in PATTERNS:
        for folder in sorted(fixtures.glob(pattern)):
            config = folder.parent / "config.json"
            vocab_size = 317 if "megatron" in pattern else None
            adapter = "adapter" if (folder / "adapter").is_dir() else None
            given = config if config.exists() else None
            found.append(Case(folder, given, vocab_size, adapter=adapter))
    own = ROOT / "tests" / "fixtures"
    if (own / "trained").exists():
        hf = own / "trained" / "hf"
        found.append(Case(hf, gguf=True))
        found.append(Case(own / "trained" / "zero3", hf / "config.json", gguf=True, tokenizer=hf))
        found.append(Case(own / "trained" / "megatron", hf / "config.json"))
    found += [Case(f) for f in sorted((own / "paddle").glob("*")) if f.is_dir()]
    if (own / "ollama" / "chat").exists():
        found.append(Case(own / "ollama" / "chat", gguf=True))
    return found


def made_cases(folder: Path) -> list[Case]:
    """Write checkpoints of further formats below a folder."""
    own = ROOT / "tests" / "fixtures" / "trained"
    hf = own / "hf"
    trained = open_checkpoint(own / "zero3", config=hf)
    found = []
    for text in LAYOUTS:
        layout = Layout.parse(text)
        target = folder / text.replace(":", "-").replace(",", "-")
        reshard(trained, target, layout, with_optimizer="hf" not in layout.format)
        found.append(Case(target, hf / "config.json", 632))
    for kind in ("q8_0", "q4_k_m"):
        target = folder / kind / "model.gguf"
        target.parent.mkdir()
        to_gguf(trained, target, kind, tokenizer=hf)
        found.append(Case(target.parent, gguf=True, tokenizer=hf))
    for name, (arrays, settings) in _quantized().items():
        save_model(folder / name, arrays, {"quantization_config": settings})
        found.append(Case(folder / name))
    (folder / "mindspore").mkdir()
    (folder / "mindspore" / "llama-1_12.ckpt").write_bytes(_mindspore())
    return [*found, Case(folder / "mindspore")]


def save_model(folder: Path, arrays: Mapping[str, np.ndarray], config: dict[str, Any]) -> None:
    """Write a Hugging Face folder with one safetensors file."""
    folder.mkdir()
    header, _ = build_header([(n, a.dtype, a.shape) for n, a in arrays.items()], None)
    data = b"".join(a.tobytes() for a in arrays.values())
    (folder / "model.safetensors").write_bytes(header + data)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))


def _quantized() -> dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]]:
    rng = np.random.default_rng(5)

    def floats(*shape: int) -> np.ndarray:
        return rng.random(shape, np.float32)

    def words(*shape: int) -> np.ndarray:
        return rng.integers(-(2**31), 2**31, shape).astype(np.int32)

    def raw(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape).astype(np.uint8)

    fp8 = rng.standard_normal((64, 96)).astype(ml_dtypes.float8_e4m3fn)
    groups = np.arange(128, dtype=np.int32) // 32
    return {
        "fp8": (
            {"a.weight": fp8, "a.weight_scale_inv": floats(2, 3), "n.weight": floats(4)},
            {"quant_method": "fp8", "weight_block_size": [32, 32]},
        ),
        "gptq": (
            {
                "a.qweight": words(16, 64), "a.qzeros": words(4, 8), "a.scales": floats(4, 64),
                "a.g_idx": groups,
            },
            {"quant_method": "gptq", "bits": 4, "group_size": 32},
        ),
        "awq": (
            {"a.qweight": words(128, 8), "a.qzeros": words(4, 8), "a.scales": floats(4, 64)},
            {"quant_method": "awq", "bits": 4, "group_size": 32},
        ),
        "mxfp4": (
            {"e.w_blocks": raw(2, 8, 3, 16), "e.w_scales": raw(2, 8, 3) // 4 + 100},
            {"quant_method": "mxfp4"},
        ),
        "int8": (
            {"a.weight": raw(6, 10).view(np.int8), "a.SCB": floats(6)},
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
        ),
    }  # fmt: skip


def _mindspore() -> bytes:
    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out += bytes([value & 127 | 128])
            value >>= 7
        return out + bytes([value])

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2]) + varint(len(data)) + data

    def value(tag: str, array: np.ndarray, parts: Iterable[bytes]) -> bytes:
        dims = b"".join(b"\x08" + varint(n) for n in array.shape)
        head = dims + field(2, b"Float32")
        return b"".join(
            field(1, field(1, tag.encode()) + field(2, head + field(3, p))) for p in parts
        )

    a = np.arange(48, dtype=np.float32).reshape(6, 8)
    raw = a.tobytes()
    return value("model.a.weight", a, [raw]) + value("model.b.weight", a, [raw[:96], raw[96:]])
