"""llama2.c files of all versions, written here by the layout of its export.py, and broken ones."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.naming import to_hf
from mconv.convert.reshard import reshard
from mconv.errors import FormatError, MconvError, UnsupportedError
from mconv.shardio.layout import Layout
from mconv.shardio.registry import open_checkpoint

DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, LENGTH = 32, 48, 3, 4, 2, 40, 16
D = DIM // HEADS
Arrays = dict[str, np.ndarray]
MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1",
            "feed_forward.w2", "feed_forward.w3")  # fmt: skip


def _model(tied: bool) -> Arrays:
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (VOCAB, DIM), "norm": (DIM,)}
    layer = {"attention_norm": (DIM,), "ffn_norm": (DIM,), "attention.wq": (DIM, DIM),
             "attention.wk": (KV * D, DIM), "attention.wv": (KV * D, DIM),
             "attention.wo": (DIM, DIM), "feed_forward.w1": (HIDDEN, DIM),
             "feed_forward.w2": (DIM, HIDDEN), "feed_forward.w3": (HIDDEN, DIM)}  # fmt: skip
    shapes |= {f"layers.{i}.{n}": s for i in range(LAYERS) for n, s in layer.items()}
    if not tied:
        shapes["output"] = (VOCAB, DIM)
    return {f"{n}.weight": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def _of_layers(m: Arrays, *names: str) -> list[np.ndarray]:
    return [m[f"layers.{i}.{n}.weight"] for n in names for i in range(LAYERS)]


def _numbers(m: Arrays, vocab: int = VOCAB) -> bytes:
    return struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, vocab, LENGTH)


def legacy(m: Arrays) -> bytes:
    """Version 0."""
    own = "output.weight" in m
    freqs = [np.full((LENGTH, D // 2), x, np.float32) for x in (0.5, 0.25)]
    layers = _of_layers(m, "attention_norm", *MATRICES[:4], "ffn_norm", *MATRICES[4:])
    parts = [m["tok_embeddings.weight"], *layers, m["norm.weight"], *freqs]  # fmt: skip
    parts += [m["output.weight"]] if own else []
    header = _numbers(m, -VOCAB if own else VOCAB)
    return header + b"".join(p.tobytes() for p in parts)


def _header(m: Arrays, version: int, group: bytes = b"") -> bytes:
    shared = bytes([int("output.weight" not in m)])
    head = struct.pack("<Ii", 0x616B3432, version) + _numbers(m) + shared + group
    return head.ljust(256, b"\0")


def _ordered(m: Arrays) -> tuple[list[np.ndarray], list[np.ndarray]]:
    norms = [*_of_layers(m, "attention_norm", "ffn_norm"), m["norm.weight"]]
    rest = [m["tok_embeddings.weight"], *_of_layers(m, *MATRICES)]
    return norms, rest + ([m["output.weight"]] if "output.weight" in m else [])


def version1(m: Arrays) -> bytes:
    """Float32 behind a header."""
    norms, rest = _ordered(m)
    return _header(m, 1) + b"".join(p.tobytes() for p in [*norms, *rest])


def quantized(array: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Int8 and the scales of groups of the flat weights."""
    flat = array.reshape(-1, group)
    scale = (np.abs(flat).max(1) / np.float32(127)).astype(np.float32)
    return np.rint(flat / scale[:, None]).astype(np.int8), scale


def version2(m: Arrays, group: int) -> bytes:
    """Q8_0 behind a header."""
    norms, rest = _ordered(m)
    out = _header(m, 2, struct.pack("<i", group)) + b"".join(p.tobytes() for p in norms)
    for array in rest:
        q, scale = quantized(array, group)
        out += q.tobytes() + scale.tobytes()
    return out


def _write(folder: Path, data: bytes, name: str = "model.bin") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("group", [16, 32])
def test_reads_back(tmp_path: Path, version: int, tied: bool, group: int) -> None:
    m = _model(tied)
    data = [legacy, version1, lambda x: version2(x, group)][version](m)
    path = _write(tmp_path, data)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.version) == ("llama2c", str(version))
    assert (checkpoint.naming, checkpoint.path) == ("meta", path)
    assert {n for n in checkpoint.weights if not n.startswith("freqs")} == set(m)
    for name, array in m.items():
        if version == 2 and array.ndim == 2:
            q, scale = quantized(array, group)
            array = (q.astype(np.float32) * scale[:, None]).reshape(array.shape)
        assert np.array_equal(checkpoint.weights[name].read(), array), name
    region = checkpoint.weights["layers.1.feed_forward.w2.weight"].read([slice(3, 9), slice(5, 21)])
    whole = checkpoint.weights["layers.1.feed_forward.w2.weight"].read()
    assert np.array_equal(region, whole[3:9, 5:21])


@pytest.mark.parametrize("tied", [True, False])
def test_computes_the_same(tmp_path: Path, tied: bool) -> None:
    """transformers' Llama of the result against llama2.c's formulas in numpy."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    m = {n: a * np.float32(0.3) for n, a in _model(tied).items()}
    reshard(open_checkpoint(_write(tmp_path, legacy(m))), tmp_path / "hf", Layout(format="hf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.config.tie_word_embeddings == tied
    assert model.config.max_position_embeddings == LENGTH
    ids = np.arange(12) % VOCAB
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, _forward(m, ids), rtol=0, atol=2e-4)


def _forward(m: Arrays, ids: np.ndarray) -> np.ndarray:
    """run.c's forward pass over all positions: adjacent rotary pairs."""

    def norm(x: Any, w: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w

    def rotate(x: Any) -> Any:
        angle = np.arange(len(ids))[:, None] / 10000 ** (np.arange(0, D, 2) / D)
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        out = x.copy()
        out[..., 0::2] = x[..., 0::2] * c - x[..., 1::2] * s
        out[..., 1::2] = x[..., 0::2] * s + x[..., 1::2] * c
        return out

    m = {n: a.astype(np.float64) for n, a in m.items()}
    x = m["tok_embeddings.weight"][ids]
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(LAYERS):
        w = {
            n.removeprefix(f"layers.{i}."): a for n, a in m.items() if n.startswith(f"layers.{i}.")
        }
        h = norm(x, w["attention_norm.weight"])
        q = rotate((h @ w["attention.wq.weight"].T).reshape(-1, HEADS, D))
        k = rotate((h @ w["attention.wk.weight"].T).reshape(-1, KV, D)).repeat(HEADS // KV, 1)
        v = (h @ w["attention.wv.weight"].T).reshape(-1, KV, D).repeat(HEADS // KV, 1)
        score = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(D) + mask
        p = np.exp(score - score.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", p, v).reshape(-1, DIM) @ w["attention.wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gate = h @ w["feed_forward.w1.weight"].T
        up = h @ w["feed_forward.w3.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["feed_forward.w2.weight"].T
    head = m.get("output.weight", m["tok_embeddings.weight"])
    return np.asarray(norm(x, m["norm.weight"]) @ head.T)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_cut_or_longer_files(tmp_path: Path, version: int) -> None:
    data = [legacy, version1, lambda m: version2(m, 16)][version](_model(True))
    for broken in (data[:-1], data[: len(data) // 2], data + b"\0"):
        path = _write(tmp_path, broken)
        with pytest.raises(FormatError):
            open_checkpoint(path, format="llama2c")
        if version:
            with pytest.raises(FormatError, match="demands"):
                open_checkpoint(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [(8, 2**31 - 1), (8, 0), (8, -1), (12, 2**31 - 1), (16, 2**31 - 1), (20, 3), (24, 0), (24, 3),
     (28, -5), (28, 2**31 - 1), (32, 0), (37, 0), (37, -1), (37, 7), (37, 2**31 - 1)],
)  # fmt: skip
def test_lying_headers(tmp_path: Path, place: int, value: int) -> None:
    data = bytearray(version2(_model(False), 16))
    struct.pack_into("<i", data, place, value)
    with pytest.raises(FormatError):
        open_checkpoint(_write(tmp_path, bytes(data)))


def test_unknown_version(tmp_path: Path) -> None:
    data = bytearray(version1(_model(False)))
    struct.pack_into("<i", data, 4, 3)
    with pytest.raises(UnsupportedError, match="version 3"):
        open_checkpoint(_write(tmp_path, bytes(data)))


def test_mutations_never_crash(tmp_path: Path) -> None:
    rng = random.Random(5)
    for whole in (legacy(_model(False)), version1(_model(True)), version2(_model(True), 16)):
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(48)] = rng.randrange(256)
            path = _write(tmp_path, bytes(data))
            try:
                to_hf(open_checkpoint(path, format="llama2c"))
            except MconvError:
                continue


def test_other_files_are_not_taken_for_it(tmp_path: Path) -> None:
    for name, data in (("a.bin", b""), ("b.bin", bytes(28)), ("c.bin", b"PK\3\4" + bytes(300))):
        _write(tmp_path, data, name)
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)
