"""The tensors of the models behind llama.cpp's type-selection snapshots, rebuilt from their sizes.

A snapshot lists, per target, the tensors whose type is not the base type; which tensors exist and
how long their rows are follows from the published configuration of each model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mconv.quant import type_by_name
from mconv.quant.recipes import ModelFacts, TensorRecord

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _dense_ffn(embd: int, ff: int) -> Shapes:
    yield "ffn_gate", (ff, embd)
    yield "ffn_up", (ff, embd)
    yield "ffn_down", (embd, ff)


def _experts(embd: int, ff: int, count: int) -> Shapes:
    yield "ffn_gate_inp", (count, embd)
    yield "ffn_gate_exps", (count, ff, embd)
    yield "ffn_up_exps", (count, ff, embd)
    yield "ffn_down_exps", (count, embd, ff)
    yield "ffn_gate_shexp", (ff, embd)
    yield "ffn_up_shexp", (ff, embd)
    yield "ffn_down_shexp", (embd, ff)


def _attention(embd: int, q: int, kv: int, out: int | None = None) -> Shapes:
    yield "attn_q", (q, embd)
    yield "attn_k", (kv, embd)
    yield "attn_v", (kv, embd)
    yield "attn_output", (embd, out or q)


def _norms(embd: int) -> Shapes:
    yield "attn_norm", (embd,)
    yield "ffn_norm", (embd,)


def _llama_70b(layer: int) -> Shapes:
    yield from _attention(8192, 8192, 1024)
    yield from _dense_ffn(8192, 28672)


def _qwen3(layer: int) -> Shapes:
    yield from _attention(1024, 2048, 1024)
    yield from _dense_ffn(1024, 3072)


def _deepseek(layer: int) -> Shapes:
    yield "attn_q_a", (1536, 7168)
    yield "attn_q_b", (24576, 1536)
    yield "attn_kv_a_mqa", (576, 7168)
    yield "attn_k_b", (128, 512, 128)
    yield "attn_v_b", (128, 128, 512)
    yield "attn_output", (7168, 16384)
    yield from _dense_ffn(7168, 18432) if layer < 3 else _experts(7168, 2048, 256)


def _glm4_moe(layer: int) -> Shapes:
    yield from _attention(4096, 12288, 1024)
    yield from _dense_ffn(4096, 10944) if layer < 1 else _experts(4096, 1408, 128)


def _qwen3_next(layer: int) -> Shapes:
    if layer % 4 == 3:
        yield from _attention(2048, 8192, 512, 4096)
    else:
        yield "attn_qkv", (8192, 2048)
        yield "attn_gate", (4096, 2048)
        yield "ssm_ba", (64, 2048)
        yield "ssm_conv1d", (8192, 4)
        yield "ssm_out", (2048, 4096)
    yield from _experts(2048, 512, 512)


def _qwen35(layer: int) -> Shapes:
    if layer % 4 == 3:
        yield from _attention(5120, 12288, 1024, 6144)
    else:
        yield "attn_qkv", (10240, 5120)
        yield "attn_gate", (6144, 5120)
        yield "ssm_alpha", (48, 5120)
        yield "ssm_beta", (48, 5120)
        yield "ssm_conv1d", (10240, 4)
        yield "ssm_out", (5120, 6144)
    yield from _dense_ffn(5120, 17408)


MODELS: dict[str, tuple[ModelFacts, int, int, Callable[[int], Shapes]]] = {
    "meta-llama-3.1-70b-instruct": (ModelFacts("llama", 80, 64, 8), 8192, 128256, _llama_70b),
    "qwen3-0.6b": (ModelFacts("qwen3", 28, 16, 8), 1024, 151936, _qwen3),
    "deepseek-v3.1": (ModelFacts("deepseek2", 61, 128, 1, 256), 7168, 129280, _deepseek),
    "glm-4.6v": (ModelFacts("glm4moe", 46, 96, 8, 128), 4096, 151552, _glm4_moe),
    "qwen3-coder-next": (ModelFacts("qwen3next", 48, 16, 2, 512), 2048, 151936, _qwen3_next),
    "qwen3.6-27b": (ModelFacts("qwen35", 64, 24, 4), 5120, 248320, _qwen35),
}
"""Snapshot name to (facts, embedding size, vocabulary, weights of a layer)."""


def records(model: str) -> list[TensorRecord]:
    """Return all tensors of a snapshot's model, in no particular order."""
    facts, embd, vocab, layer_shapes = MODELS[model]
    f32 = type_by_name("F32")
    out = [
        TensorRecord("token_embd.weight", (vocab, embd), f32),
        TensorRecord("output.weight", (vocab, embd), f32),
        TensorRecord("output_norm.weight", (embd,), f32),
    ]
    for layer in range(facts.layers):
        for stem, shape in (*_norms(embd), *layer_shapes(layer)):
            out.append(TensorRecord(f"blk.{layer}.{stem}.weight", shape, f32))
    return out
