"""LitGPT's names for Llama-like models: fused ``attn.qkv`` [Q | K | V], older ``attn.attn`` with
the rows of each query group together.

LitGPT keeps the model's config.json beside ``lit_model.pth``. Source: litgpt ``model.py`` and
``scripts/convert_lit_checkpoint.py``.
"""

from __future__ import annotations

from ._world import Settings, Variant, World, rope_theta
from .table import Rule, rule

_L, _H = "transformer.h.{i}", "model.layers.{i}"


def _pair(left: str, right: str, need: str) -> tuple[Rule, Rule]:
    """A weight, and the bias that some models have."""
    return (
        rule(f"{_L}.{left}.weight", f"{_H}.{right}.weight", "same", need),
        rule(f"{_L}.{left}.bias", f"{_H}.{right}.bias"),
    )


def _body() -> tuple[Rule, ...]:
    lines = [
        rule("transformer.wte.weight", "model.embed_tokens.weight", "trim_vocab", "embedding"),
        rule("transformer.ln_f.weight", "model.norm.weight", "same", "final norm"),
        rule("lm_head.weight", "lm_head.weight", "trim_vocab", "head"),
        *_pair("norm_1", "input_layernorm", "first norm"),
        *_pair("norm_2", "post_attention_layernorm", "second norm"),
        *_pair("attn.proj", "self_attn.o_proj", "attention output"),
    ]
    for kind in ("weight", "bias"):
        parts = tuple(f"{_H}.self_attn.{x}_proj.{kind}" for x in "qkv")
        need = "attention" if kind == "weight" else ""
        lines.append(Rule((f"{_L}.attn.qkv.{kind}",), parts, "split_qkv_blocks", need))
        lines.append(Rule((f"{_L}.attn.attn.{kind}",), parts, "split_qkv", need))
    return tuple(lines)


_MLP = (
    *_pair("mlp.fc_1", "mlp.gate_proj", "gate"),
    *_pair("mlp.fc_2", "mlp.up_proj", "up"),
    *_pair("mlp.proj", "mlp.down_proj", "down"),
)
_MOE = (
    _pair("mlp.gate", "block_sparse_moe.gate", "router")[0],
    *(
        _pair(f"mlp.experts.{{e}}.{left}", f"block_sparse_moe.experts.{{e}}.{w}", left)[0]
        for left, w in (("fc_1", "w1"), ("fc_2", "w3"), ("proj", "w2"))
    ),
)
_NORMS = (
    _pair("attn.norm_q", "self_attn.q_norm", "")[0],
    _pair("attn.norm_k", "self_attn.k_norm", "")[0],
)
_VARIANTS = {
    "llama": Variant("LlamaForCausalLM", (*_body(), *_MLP)),
    "mistral": Variant("MistralForCausalLM", (*_body(), *_MLP)),
    "mixtral": Variant("MixtralForCausalLM", (*_body(), *_MOE)),
    "qwen2": Variant("Qwen2ForCausalLM", (*_body(), *_MLP)),
    "qwen3": Variant("Qwen3ForCausalLM", (*_body(), *_MLP, *_NORMS)),
}


def _foreign(config: Settings) -> Settings:
    return {
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_query_groups": config.get("num_key_value_heads") or config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "rope_base": rope_theta(config),
        "padded_vocab_size": config["vocab_size"],
    }


NAMING = World(
    "litgpt",
    "LitGPT",
    lambda ckpt: _VARIANTS,
    lambda ckpt: {},
    _foreign,
    buffers=("cos", "sin", "mask_cache"),
).naming
