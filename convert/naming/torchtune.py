"""torchtune's own names, as its intermediate and distributed checkpoints have them.

Llama and Mistral models keep Meta's rotary order; Qwen models have Hugging Face's. Source:
torchtune ``models/convert_weights.py`` and ``models/qwen2/_convert_weights.py``.
"""

from __future__ import annotations

from ._world import Settings, Variant, World, rope_theta
from .table import Rule, rule

_L, _H = "layers.{i}", "model.layers.{i}"


def _rules(*, rotary_pairs: bool) -> tuple[Rule, ...]:
    lines = [
        rule("tok_embeddings.weight", "model.embed_tokens.weight", "trim_vocab", "embedding"),
        rule("norm.scale", "model.norm.weight", "same", "final norm"),
        rule("output.weight", "lm_head.weight", "trim_vocab", "head"),
        rule(f"{_L}.sa_norm.scale", f"{_H}.input_layernorm.weight", "same", "first norm"),
        rule(f"{_L}.mlp_norm.scale", f"{_H}.post_attention_layernorm.weight", "same", "second"),
    ]
    for left, right in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
        how = f"deinterleave_{left}" if rotary_pairs and left in "qk" else "same"
        source, target = f"{_L}.attn.{left}_proj", f"{_H}.self_attn.{right}_proj"
        lines.append(rule(f"{source}.weight", f"{target}.weight", how, right))
        lines.append(rule(f"{source}.bias", f"{target}.bias", how))
    for norm in ("q_norm", "k_norm"):
        lines.append(rule(f"{_L}.attn.{norm}.scale", f"{_H}.self_attn.{norm}.weight"))
    for left, right in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        lines.append(rule(f"{_L}.mlp.{left}.weight", f"{_H}.mlp.{right}_proj.weight", "same", left))
    return tuple(lines)


_NOTE = "rows of q and k are reordered from torchtune's rotary pairs to Hugging Face's halves"
_VARIANTS = {
    "llama": Variant("LlamaForCausalLM", _rules(rotary_pairs=True), _NOTE),
    "mistral": Variant("MistralForCausalLM", _rules(rotary_pairs=True), _NOTE),
    "qwen2": Variant("Qwen2ForCausalLM", _rules(rotary_pairs=False)),
    "qwen3": Variant("Qwen3ForCausalLM", _rules(rotary_pairs=False)),
}


def _foreign(config: Settings) -> Settings:
    return {"model_type": config.get("model_type"), "rope_base": rope_theta(config)}


NAMING = World("torchtune", "torchtune", lambda ckpt: _VARIANTS, lambda ckpt: {}, _foreign).naming
