"""torchtitan's names, old (``attention.wq``) and new (``attention.qkv_linear.wq``).

Llama 3 keeps Meta's rotary order, so q and k rows are reordered for Hugging Face; Qwen3 and
DeepSeek-V3 have Hugging Face's own. The checkpoint carries no model settings: a config.json has to
be given. Source: torchtitan ``models/*/state_dict_adapter.py`` of 2024 to 2026.
"""

from __future__ import annotations

from collections.abc import Iterator

from ._world import Settings, Variant, World, rope_theta
from .meta import attention, feed_forward, norms, outer
from .table import Rule, rule

_L, _H = "layers.{i}", "model.layers.{i}"
_PLACES = (f"{_L}.attention", f"{_L}.attention.qkv_linear")


def _attention(*, rotary_pairs: bool) -> tuple[Rule, ...]:
    """Both generations, the new one first: it is the one that is written."""
    old, new = (attention(place, rotary_pairs=rotary_pairs) for place in _PLACES)
    return (*(r for r in new if ".wo." not in r.left[0]), *old)


def _outer() -> tuple[Rule, ...]:
    return (*outer("lm_head.weight"), outer("output.weight")[-1])


def _pair(left: str, right: str, need: str = "") -> Rule:
    return rule(f"{_L}.{left}", f"{_H}.{right}", "same", need)


def _experts() -> Iterator[Rule]:
    """Stacked routed experts, old and new, the router and the shared experts."""
    yield _pair("moe.router.gate.weight", "mlp.gate.weight")
    for w, p, dims in (("w1", "gate", "EFD"), ("w2", "down", "EDF"), ("w3", "up", "EFD")):
        target = f"{_H}.mlp.experts.{{e}}.{p}_proj.weight"
        for place in (f"routed_experts.inner_experts.{w}_{dims}", f"experts.{w}"):
            yield rule(f"{_L}.moe.{place}", target, "unstack_experts")
        yield _pair(f"moe.shared_experts.{w}.weight", f"mlp.shared_experts.{p}_proj.weight")
    for bias in ("expert_bias_E", "expert_bias"):
        yield _pair(f"moe.{bias}", "mlp.gate.e_score_correction_bias")


def _optional(rules: tuple[Rule, ...]) -> Iterator[Rule]:
    """The dense MLP of models in which some layers have experts instead."""
    for r in rules:
        yield Rule(r.left, r.right, r.how)


def _latent_attention() -> Iterator[Rule]:
    yield _pair("attention.wkv_a.weight", "self_attn.kv_a_proj_with_mqa.weight", "kv down")
    yield _pair("attention.kv_norm.weight", "self_attn.kv_a_layernorm.weight", "kv norm")
    yield _pair("attention.wkv_b.weight", "self_attn.kv_b_proj.weight", "kv up")
    yield _pair("attention.wo.weight", "self_attn.o_proj.weight", "attention output")
    yield _pair("attention.wq.weight", "self_attn.q_proj.weight")
    yield _pair("attention.wq_a.weight", "self_attn.q_a_proj.weight")
    yield _pair("attention.q_norm.weight", "self_attn.q_a_layernorm.weight")
    yield _pair("attention.wq_b.weight", "self_attn.q_b_proj.weight")


_QK_NORMS = tuple(_pair(f"attention.{x}_norm.weight", f"self_attn.{x}_norm.weight") for x in "qk")
_QWEN = (*_outer(), *_attention(rotary_pairs=False), *_QK_NORMS, *norms())
_VARIANTS = {
    "llama": Variant(
        "LlamaForCausalLM",
        (*_outer(), *_attention(rotary_pairs=True), *norms(), *feed_forward()),
        "rows of q and k are reordered from torchtitan's rotary pairs to Hugging Face's halves",
    ),
    "qwen3": Variant("Qwen3ForCausalLM", (*_QWEN, *feed_forward())),
    "qwen3_moe": Variant("Qwen3MoeForCausalLM", (*_QWEN, *_optional(feed_forward()), *_experts())),
    "deepseek_v3": Variant(
        "DeepseekV3ForCausalLM",
        (*_outer(), *_latent_attention(), *norms(), *_optional(feed_forward()), *_experts()),
    ),
}


def _foreign(config: Settings) -> Settings:
    return {"model_type": config.get("model_type"), "rope_theta": rope_theta(config)}


NAMING = World(
    "torchtitan",
    "torchtitan",
    lambda ckpt: _VARIANTS,
    lambda ckpt: {},
    _foreign,
    buffers=("freqs_cis", "rope.cache"),
).naming
