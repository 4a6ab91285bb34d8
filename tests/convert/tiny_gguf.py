"""Tiny GGUF models with the shapes that the type recipes tell apart, and importance matrices.

Only the metadata that llama-quantize asks for is there, so the same files serve the tests and the
comparison with that program. Weights are heavy-tailed, as trained ones are, and made of exact
arithmetic on raw random bits, so that digests of them hold for every numpy version.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from mconv.convert.gguf import KeyValue, TensorSpec, ValueType, build_header
from mconv.convert.gguf.values import f32, i32_array, string, strings, u32
from mconv.quant import type_by_name

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
VOCAB = 64


@dataclass(frozen=True)
class Spec:
    """Sizes of a model."""

    arch: str = "llama"
    layers: int = 8
    embd: int = 256
    ff: int = 256
    heads: int = 4
    kv_heads: int = 4
    experts: int = 0
    tied: bool = False
    fused: bool = False
    thin: bool = False  # few rows per matrix
    dtype: str = "BF16"


MODELS: Mapping[str, Spec] = {
    "dense": Spec(),
    "gqa": Spec(heads=8, kv_heads=2, ff=512, dtype="F16"),
    "moe": Spec(arch="qwen3moe", heads=8, kv_heads=1, experts=4, layers=16, thin=True),
    "moe8": Spec(heads=8, kv_heads=2, experts=8, thin=True),
    "tied": Spec(arch="qwen2", layers=24, tied=True, dtype="F32", thin=True),
    "odd": Spec(embd=288, ff=160, thin=True),
    "falcon": Spec(arch="falcon", fused=True, layers=32, kv_heads=1, thin=True),
    "70b": Spec(layers=80, heads=8, kv_heads=1, thin=True),
}


def weights(spec: Spec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and row-major shape of every tensor."""
    rows = 8 if spec.thin else spec.embd
    kv = max(1, rows * spec.kv_heads // spec.heads)
    yield "token_embd.weight", (VOCAB, spec.embd)
    for i in range(spec.layers):
        blk = f"blk.{i}"
        yield f"{blk}.attn_norm.weight", (spec.embd,)
        if spec.fused:
            yield f"{blk}.attn_qkv.weight", (rows + 2 * kv, spec.embd)
        else:
            yield f"{blk}.attn_q.weight", (rows, spec.embd)
            yield f"{blk}.attn_k.weight", (kv, spec.embd)
            yield f"{blk}.attn_v.weight", (kv, spec.embd)
        yield f"{blk}.attn_output.weight", (rows, spec.embd)
        yield f"{blk}.ffn_norm.weight", (spec.embd,)
        lead = (spec.experts,) if spec.experts else ()
        stem = "_exps" if spec.experts else ""
        if spec.experts:
            yield f"{blk}.ffn_gate_inp.weight", (spec.experts, spec.embd)
        ff = 8 if spec.thin else spec.ff
        yield f"{blk}.ffn_gate{stem}.weight", (*lead, ff, spec.embd)
        yield f"{blk}.ffn_up{stem}.weight", (*lead, ff, spec.embd)
        yield f"{blk}.ffn_down{stem}.weight", (*lead, rows, spec.ff)
    yield "output_norm.weight", (spec.embd,)
    if not spec.tied:
        yield "output.weight", (VOCAB, spec.embd)


def metadata(spec: Spec) -> list[KeyValue]:
    """Return the metadata of a model, of every value kind that a copy must keep."""
    a = spec.arch
    experts = [u32(f"{a}.expert_count", spec.experts), u32(f"{a}.expert_used_count", 2)]
    return [
        string("general.architecture", a),
        string("general.name", "Tiny näme"),
        u32("general.file_type", 32),
        u32(f"{a}.block_count", spec.layers),
        u32(f"{a}.context_length", 512),
        u32(f"{a}.embedding_length", spec.embd),
        u32(f"{a}.feed_forward_length", spec.ff),
        u32(f"{a}.attention.head_count", spec.heads),
        u32(f"{a}.attention.head_count_kv", spec.kv_heads),
        f32(f"{a}.attention.layer_norm_rms_epsilon", 1e-5),
        f32(f"{a}.attention.layer_norm_epsilon", 1e-5),
        f32(f"{a}.rope.freq_base", 500000.0),
        u32(f"{a}.expert_feed_forward_length", spec.ff),
        *(experts if spec.experts else ()),
        strings("tokenizer.ggml.tokens", [f"t{i}é" for i in range(VOCAB)]),
        i32_array("tokenizer.ggml.token_type", np.arange(VOCAB)),
        KeyValue("test.bool", ValueType.BOOL, True),
        KeyValue("test.f64", ValueType.F64, 0.1),
        KeyValue("test.i64", ValueType.I64, -(2**40)),
    ]


def uniform(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers in [0, 1) straight from a bit generator."""
    raw = bits.random_raw(int(np.prod(shape)))
    return (raw >> np.uint64(11)).reshape(shape) * 2.0**-53


def heavy_tailed(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 numbers around zero with rare large ones."""
    bell = sum(uniform(bits, shape) for _ in range(4)) - 2
    return (0.02 * bell / (0.1 + uniform(bits, shape))).astype(np.float32)


def _fourth(x: np.ndarray) -> np.ndarray:
    square = x * x  # a power would go through the C library, whose last bits vary
    return square * square


def values(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """Return heavy-tailed weights; vectors are float32."""
    bits = np.random.PCG64(seed)
    out = {}
    for name, shape in weights(spec):
        x = heavy_tailed(bits, shape)
        plain = len(shape) == 1 or "gate_inp" in name
        out[name] = x if plain else x.astype(_DTYPES[spec.dtype])
    return out


def write_gguf(
    path: Path, entries: list[KeyValue], tensors: Mapping[str, np.ndarray], **header: int
) -> Path:
    """Write plain arrays as a GGUF file."""
    names = {np.dtype(v): k for k, v in _DTYPES.items()}
    kinds = [type_by_name(names[x.dtype]) for x in tensors.values()]
    specs = [
        TensorSpec(name, x.shape, kind.id, x.nbytes)
        for (name, x), kind in zip(tensors.items(), kinds, strict=True)
    ]
    head = build_header(entries, specs, **header)
    data = bytearray(head.file_size)
    data[: len(head.data)] = head.data
    for offset, x in zip(head.offsets, tensors.values(), strict=True):
        data[offset : offset + x.nbytes] = np.ascontiguousarray(x).tobytes()
    path.write_bytes(data)
    return path


def write_model(path: Path, spec: Spec, seed: int = 0) -> Path:
    """Write a model with random weights."""
    return write_gguf(path, metadata(spec), values(spec, seed))


def write_split(folder: Path, spec: Spec, count: int = 3) -> Path:
    """Write a model as a split set; return its first file."""
    tensors = list(values(spec).items())
    per = -(-len(tensors) // count)
    for number in range(count):
        entries = [
            *(metadata(spec) if number == 0 else ()),
            KeyValue("split.no", ValueType.U16, number),
            KeyValue("split.count", ValueType.U16, count),
            KeyValue("split.tensors.count", ValueType.I32, len(tensors)),
        ]
        part = dict(tensors[number * per : (number + 1) * per])
        write_gguf(folder / f"m-{number + 1:05d}-of-{count:05d}.gguf", entries, part)
    return folder / f"m-00001-of-{count:05d}.gguf"


def importance(spec: Spec, seed: int = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (sums [matrices, cols], counts [matrices]) for every measured weight.

    Some columns were never active, and the last expert saw no token.
    """
    bits = np.random.PCG64(seed)
    out = {}
    for name, shape in weights(spec):
        if not name.startswith("blk.") or len(shape) < 2 or "gate_inp" in name:
            continue
        matrices = shape[0] if len(shape) > 2 else 1
        sums = (_fourth(uniform(bits, (matrices, shape[-1]))) * 100).astype(np.float32)
        sums[:, ::37] = 0
        counts = (50 + bits.random_raw(matrices) % np.uint64(450)).astype(np.float32)
        if matrices > 1:
            counts[-1] = 0
        out[name] = sums, counts
    return out


def write_imatrix(path: Path, spec: Spec) -> Path:
    """Write an importance matrix as GGUF."""
    tensors: dict[str, np.ndarray] = {}
    for name, (sums, counts) in importance(spec).items():
        tensors[f"{name}.in_sum2"] = sums
        tensors[f"{name}.counts"] = counts.reshape(-1, 1)
    entries = [
        string("general.type", "imatrix"),
        strings("imatrix.datasets", ["wiki.train.raw", "more.txt"]),
        u32("imatrix.chunk_count", 7),
        u32("imatrix.chunk_size", 512),
    ]
    return write_gguf(path, entries, tensors)


def write_dat(path: Path, spec: Spec, *, trailer: bool = True) -> Path:
    """Write an importance matrix in the older format (which knows no experts' counts)."""
    data = importance(spec)
    out = [struct.pack("<i", len(data))]
    for name, (sums, _) in data.items():
        raw = name.encode()
        out.append(struct.pack(f"<i{len(raw)}sii", len(raw), raw, 5, sums.size) + sums.tobytes())
    if trailer:
        out.append(struct.pack("<ii8s", 9, 8, b"wiki.raw"))
    path.write_bytes(b"".join(out))
    return path
