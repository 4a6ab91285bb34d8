"""PaddleNLP's names: Hugging Face's under another root, linear weights [in, out], qkv and gate/up
fused where the config says so.

A fused ``qkv_proj`` holds the columns of each query group together, ``gate_up_fused_proj`` is
[gate | up]. PaddleNLP's config.json is Hugging Face's with more keys. Source: PaddleNLP
``transformers/*/modeling.py`` (``_get_name_mappings``, ``_get_fuse_or_split_param_mappings``).
"""

from __future__ import annotations

from collections.abc import Mapping

from ...shardio.checkpoint import Checkpoint
from ._world import Settings, Variant, World
from .table import Rule, rule

_H = "model.layers.{i}"
_BUFFER = ".self_attn.rotary_emb.inv_freq"


def _rules(root: str, *, moe: bool = False) -> tuple[Rule, ...]:
    at = f"{root}.layers.{{i}}"
    lines = [
        rule(f"{root}.embed_tokens.weight", "model.embed_tokens.weight", "same", "embedding"),
        rule(f"{root}.norm.weight", "model.norm.weight", "same", "final norm"),
        rule("lm_head.weight", "lm_head.weight", "transpose", "head"),
    ]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        lines.append(rule(f"{at}.{norm}.weight", f"{_H}.{norm}.weight", "same", norm))
    for x in "qkvo":
        name, need = f"self_attn.{x}_proj", "output" if x == "o" else x
        lines.append(rule(f"{at}.{name}.weight", f"{_H}.{name}.weight", "transpose", need))
        lines.append(rule(f"{at}.{name}.bias", f"{_H}.{name}.bias"))
    for kind, how, need in (("weight", "columns_qkv", "q|k|v"), ("bias", "split_qkv", "")):
        parts = tuple(f"{_H}.self_attn.{x}_proj.{kind}" for x in "qkv")
        lines.append(rule(f"{at}.self_attn.qkv_proj.{kind}", parts, how, need))
    return (*lines, *(_experts(at) if moe else _mlp(at)))


def _mlp(at: str) -> list[Rule]:
    lines = [
        rule(f"{at}.mlp.{x}_proj.weight", f"{_H}.mlp.{x}_proj.weight", "transpose", x)
        for x in ("gate", "up", "down")
    ]
    both = tuple(f"{_H}.mlp.{x}_proj.weight" for x in ("gate", "up"))
    fused = f"{at}.mlp.gate_up_fused_proj.weight"
    return [*lines, rule(fused, both, "columns_gate_up", "gate|up")]


def _experts(at: str) -> list[Rule]:
    part = "block_sparse_moe"
    lines = [rule(f"{at}.{part}.gate.weight", f"{_H}.{part}.gate.weight", "transpose", "router")]
    for w in ("w1", "w2", "w3"):
        name = f"{part}.experts.{{e}}.{w}.weight"
        lines.append(rule(f"{at}.{name}", f"{_H}.{name}", "transpose", w))
    return lines


_VARIANTS = {
    "llama": Variant("LlamaForCausalLM", _rules("llama")),
    "mistral": Variant("MistralForCausalLM", _rules("mistral")),
    "mixtral": Variant("MixtralForCausalLM", _rules("mixtral", moe=True)),
    "qwen2": Variant("Qwen2ForCausalLM", _rules("qwen2")),
}


def _known(ckpt: Checkpoint) -> Mapping[str, Variant]:
    return _VARIANTS


def _buffers(ckpt: Checkpoint) -> tuple[str, ...]:
    return tuple(n for n in ckpt.weights if n.endswith(_BUFFER))


def _foreign(config: Settings) -> Settings:
    return {"model_type": config.get("model_type"), "tensor_parallel_degree": 1}


NAMING = World(
    "paddlenlp", "PaddleNLP", _known, lambda ckpt: {}, _foreign, left_out=_buffers
).naming
