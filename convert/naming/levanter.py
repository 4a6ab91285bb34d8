"""Levanter's Llama-like names: Hugging Face's, with all layers in one array and heads as dims.

Weights are [layers, out dims, in dims], before 2024 [layers, in dims, out dims]; the model's width
tells which. Source: levanter ``models/llama.py``, ``layers/attention.py``, haliax ``nn/linear.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...shardio.checkpoint import Checkpoint
from ...shardio.tensor import LazyTensor
from ..movement import transpose
from ._lines import Lines, Variants, layer_count, root_of
from ._steps import chain, each
from ._world import Settings, Variant, World
from .table import Rule
from .transforms import Sizes, Transform

_H = "model.layers.{i}"
_EMBEDDING = "embeddings.token_embeddings.weight"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm")
Dims = Callable[[Sizes], tuple[int, ...]]


def _query(sizes: Sizes) -> tuple[int, ...]:
    return sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.head_dim


def _key(sizes: Sizes) -> tuple[int, ...]:
    return sizes.kv_heads, sizes.head_dim


def _heads(sizes: Sizes) -> tuple[int, ...]:
    return sizes.heads, sizes.head_dim


def _one(sizes: Sizes) -> tuple[int, ...]:
    return (-1,)


def _into(width: int, dims: Dims = _one) -> Transform:
    """A projection of the model's width into ``dims`` -> [out, in]."""

    def flat(t: LazyTensor, sizes: Sizes) -> LazyTensor:
        if t.shape[-1] == width:
            return t.reshape((-1, width))
        return transpose(t.reshape((width, -1)))

    return each(flat, lambda t, sizes: t.reshape((*dims(sizes), t.shape[-1])))


def _out_of(width: int, dims: Dims = _one) -> Transform:
    """A projection of ``dims`` to the model's width -> [out, in]."""

    def flat(t: LazyTensor, sizes: Sizes) -> LazyTensor:
        if t.shape[0] == width:
            return t.reshape((width, -1))
        return transpose(t.reshape((-1, width)))

    return each(flat, lambda t, sizes: t.reshape((t.shape[0], *dims(sizes))))


def _vector(dims: Dims) -> Transform:
    return each(lambda t, sizes: t.reshape((-1,)), lambda t, sizes: t.reshape(dims(sizes)))


def _rules(ckpt: Checkpoint) -> list[Rule]:
    at = root_of(ckpt.weights, _EMBEDDING)
    at = "model." if at is None else at
    embedding = ckpt.weights.get(at + _EMBEDDING)
    width = embedding.shape[-1] if embedding is not None and embedding.ndim else 0
    width = width or int((ckpt.config or {}).get("hidden_size", 0))
    lines, block = Lines(ckpt.weights, layer_count(ckpt)), f"{at}transformer.layers.stacked"
    lines.one(at + _EMBEDDING, "model.embed_tokens.weight", "trim_vocab", "embedding")
    lines.one(f"{at}transformer.norm.weight", "model.norm.weight", "same", "final norm")
    head = chain(_into(width), "trim_vocab")
    lines.one(f"{at}lm_head.weight", "lm_head.weight", head, "head")
    for norm in _NORMS:
        lines.stacked(f"{block}.{norm}.weight", f"{_H}.{norm}.weight", "same", norm)
    for x, dims in (("q", _query), ("k", _key), ("v", _key)):
        part = f"self_attn.{x}_proj"
        lines.stacked(f"{block}.{part}.weight", f"{_H}.{part}.weight", _into(width, dims), x)
        lines.stacked(f"{block}.{part}.bias", f"{_H}.{part}.bias", _vector(dims))
        part = f"self_attn.{x}_norm.weight"
        lines.stacked(f"{block}.{part}", f"{_H}.{part}")
    part = "self_attn.o_proj.weight"
    lines.stacked(f"{block}.{part}", f"{_H}.{part}", _out_of(width, _heads), "output")
    for x, how in (("gate", _into(width)), ("up", _into(width)), ("down", _out_of(width))):
        part = f"mlp.{x}_proj.weight"
        lines.stacked(f"{block}.{part}", f"{_H}.{part}", how, x)
    return lines.rules


def _variants(ckpt: Checkpoint) -> Mapping[str, Variant]:
    return Variants(_ARCHITECTURES, lambda kind: _rules(ckpt))


def _foreign(config: Settings) -> Settings:
    return {"model_type": config.get("model_type")}


NAMING = World("levanter", "Levanter", _variants, lambda ckpt: {}, _foreign).naming
