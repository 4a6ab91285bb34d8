"""EasyLM's Llama names (``transformer.h.0.attention.wq.kernel``), as JAX saves them.

Kernels are [in, out]; rotary pairs lie side by side as in Meta's files; norms are ``kernel`` too.
EasyLM keeps its settings in a pickle that is not read: config.json is needed. Source: EasyLM
``models/llama/llama_model.py``, ``convert_easylm_to_hf.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...shardio.checkpoint import Checkpoint
from ._lines import Lines, Variants, layer_count, root_of
from ._steps import chain, kv_heads, q_heads, rotary, trimmed
from ._world import Settings, Variant, World
from .table import Rule

_H = "model.layers.{i}"
_EMBEDDING = "transformer.wte.embedding"
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_PARTS = (
    ("attention.wv", "self_attn.v_proj"), ("attention.wo", "self_attn.o_proj"),
    ("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w2", "mlp.down_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
)  # fmt: skip
_NORMS = (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))


def _rules(ckpt: Checkpoint) -> list[Rule]:
    at = root_of(ckpt.weights, _EMBEDDING) or ""
    lines, block = Lines(ckpt.weights, layer_count(ckpt)), f"{at}transformer.h.{{i}}"
    lines.one(at + _EMBEDDING, "model.embed_tokens.weight", "trim_vocab", "embedding")
    lines.one(f"{at}transformer.ln_f.kernel", "model.norm.weight", "same", "final norm")
    lines.one(f"{at}lm_head.kernel", "lm_head.weight", trimmed("transpose"), "head")
    for x, heads in (("q", q_heads), ("k", kv_heads)):
        lines.each(f"{block}.attention.w{x}.kernel", f"{_H}.self_attn.{x}_proj.weight",
                   chain("transpose", rotary(heads)), x)  # fmt: skip
    for left, right in _PARTS:
        lines.each(f"{block}.{left}.kernel", f"{_H}.{right}.weight", "transpose", left)
    for left, right in _NORMS:
        lines.each(f"{block}.{left}.kernel", f"{_H}.{right}.weight", "same", left)
    return lines.rules


def _variants(ckpt: Checkpoint) -> Mapping[str, Variant]:
    return Variants(_ARCHITECTURES, lambda kind: _rules(ckpt))


def _foreign(config: Settings) -> Settings:
    return {
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
    }


NAMING = World("easylm", "EasyLM", _variants, lambda ckpt: {}, _foreign).naming
