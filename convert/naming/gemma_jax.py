"""Names of Google's own Gemma checkpoints (flax in Orbax): Gemma 1, 2 and the text part of 3.

Einsum weights: ``q_einsum`` [heads, embed, head_dim], ``kv_einsum`` with 2 and ``qkv_einsum`` with
3 of them in front, ``attn_vec_einsum`` [heads, head_dim, embed], ``gating_einsum`` [2, embed,
hidden] or [2, hidden, embed]. Norm weights are stored minus one, as Hugging Face has them. Source:
gemma ``gm/nn/_modules.py``, ``gm/ckpts/_compat.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...shardio.checkpoint import Checkpoint
from ._lines import Lines, Variants, config_of, layer_count, root_of
from ._steps import HEADS_FIRST, OUT_OF_HEADS, parts
from ._world import Settings, Variant, World
from .record import Model, Naming, Request
from .table import Rule

_H = "model.layers.{i}"
_EMBEDDING = "embedder.input_embedding"
_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
}  # fmt: skip
_NORMS = {
    "gemma": (
        ("pre_attention_norm", "input_layernorm"),
        ("pre_ffw_norm", "post_attention_layernorm"),
    ),
    "gemma2": (
        ("pre_attention_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("pre_ffw_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ),
}
_VISION = ("vision_encoder.", "embedder.mm_")


def _rules(ckpt: Checkpoint, kind: str) -> list[Rule]:
    at = root_of(ckpt.weights, _EMBEDDING)
    lines = Lines(ckpt.weights, layer_count(ckpt))
    at = "transformer." if at is None else at
    block = f"{at}layer_{{i}}"
    lines.one(at + _EMBEDDING, "model.embed_tokens.weight", "trim_vocab", "embedding")
    lines.one(f"{at}final_norm.scale", "model.norm.weight", "same", "final norm")
    for left, right in _NORMS["gemma" if kind == "gemma" else "gemma2"]:
        lines.each(f"{block}.{left}.scale", f"{_H}.{right}.weight", "same", left)
    q, k, v = (f"{_H}.self_attn.{x}_proj.weight" for x in "qkv")
    config, foreign = config_of(ckpt), ckpt.naming == "gemma_jax"
    alike = config.get("num_attention_heads") == config.get("num_key_value_heads")
    if foreign or not alike:
        lines.each(f"{block}.attn.q_einsum.w", q, HEADS_FIRST, "q")
        lines.each(f"{block}.attn.kv_einsum.w", (k, v), parts(HEADS_FIRST, 0, 2), "k|v")
    if foreign or alike:
        lines.each(f"{block}.attn.qkv_einsum.w", (q, k, v), parts(HEADS_FIRST, 0, 3), "q|k|v")
    lines.each(f"{block}.attn.attn_vec_einsum.w", f"{_H}.self_attn.o_proj.weight",
               OUT_OF_HEADS, "output")  # fmt: skip
    for word in ("query", "key"):
        right = f"{_H}.self_attn.{word[0]}_norm.weight"
        need = f"{word} norm" if kind == "gemma3_text" else ""
        lines.each(f"{block}.attn._{word}_norm.scale", right, "same", need)
    both = (f"{_H}.mlp.gate_proj.weight", f"{_H}.mlp.up_proj.weight")
    gate = parts("same" if _gate_rows_first(ckpt, at) else "transpose")
    for end in ("", ".w") if foreign else ("",):
        lines.each(f"{block}.mlp.gating_einsum{end}", both, gate, "gate and up")
        lines.each(f"{block}.mlp.linear{end}", f"{_H}.mlp.down_proj.weight", "transpose", "down")
    return lines.rules


def _gate_rows_first(ckpt: Checkpoint, at: str) -> bool:
    """Whether ``gating_einsum`` is [2, hidden, embed], as in the larger models."""
    width = ckpt.weights.get(at + _EMBEDDING)
    gates = (ckpt.weights.get(f"{at}layer_0.mlp.gating_einsum{e}") for e in ("", ".w"))
    gate = next((g for g in gates if g is not None), None)
    if width is None or gate is None or gate.ndim != 3 or width.ndim != 2:
        return False
    return gate.shape[2] == width.shape[1] != gate.shape[1]


def _variants(ckpt: Checkpoint) -> Mapping[str, Variant]:
    return Variants(_ARCHITECTURES, lambda kind: _rules(ckpt, kind))


def _vision(ckpt: Checkpoint) -> tuple[str, ...]:
    return tuple(n for n in ckpt.weights if any(v in n for v in _VISION))


def _foreign(config: Settings) -> Settings:
    return {"model_type": config.get("model_type")}


_WORLD = World(
    "gemma_jax", "Gemma (JAX)", _variants, lambda ckpt: {}, _foreign, left_out=_vision
).naming


def _describe(ckpt: Checkpoint, request: Request) -> Model:
    """A config.json of the multimodal Gemma 3 stands for its text part."""
    text = config_of(ckpt).get("text_config")
    if isinstance(text, Mapping):
        ckpt = replace(ckpt, config=dict(text))
    return _WORLD.describe(ckpt, request)


NAMING = Naming(_WORLD.name, _WORLD.title, _describe, _WORLD.plan)
