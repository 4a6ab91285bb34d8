"""LitGPT's names: fused ``attn.qkv`` [Q | K | V], older ``attn.attn`` with the rows of each query
group together, as Hugging Face's GPT-NeoX has them.

Beside ``lit_model.pth`` lie its own ``model_config.yaml`` and, for models that came from there,
Hugging Face's config.json. Source: litgpt ``model.py``, ``scripts/convert_lit_checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...shardio.assets import around
from ...shardio.checkpoint import Checkpoint
from ...shardio.tensor import LazyTensor
from ._litgpt_config import FILE, read_config
from ._world import Settings, Variant, World, rope_theta
from .table import Rule, rule
from .transforms import TRANSFORMS, Sizes, Transform

_L, _H = "transformer.h.{i}", "model.layers.{i}"


def _pair(left: str, right: str, need: str) -> tuple[Rule, Rule]:
    """A weight, and the bias that some models have."""
    return (
        rule(f"{_L}.{left}.weight", f"{_H}.{right}.weight", "same", need),
        rule(f"{_L}.{left}.bias", f"{_H}.{right}.bias"),
    )


def _outer() -> list[Rule]:
    return [
        rule("transformer.wte.weight", "model.embed_tokens.weight", "trim_vocab", "embedding"),
        rule("transformer.ln_f.weight", "model.norm.weight", "same", "final norm"),
        rule("lm_head.weight", "lm_head.weight", "trim_vocab", "head"),
        *_pair("norm_1", "input_layernorm", "first norm"),
        *_pair("attn.proj", "self_attn.o_proj", "attention output"),
    ]


def _body(second: str = "post_attention_layernorm") -> tuple[Rule, ...]:
    """All but the MLP, with Hugging Face's name of the norm before that."""
    lines = [*_outer(), *_pair("norm_2", second, "second norm")]
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
_QWEN_MOE = (
    _pair("mlp.gate", "mlp.gate", "router")[0],
    *(
        _pair(f"mlp.experts.{{e}}.{left}", f"mlp.experts.{{e}}.{right}_proj", left)[0]
        for left, right in (("fc_1", "gate"), ("fc_2", "up"), ("proj", "down"))
    ),
)
_GEMMA_NORMS = (
    _pair("post_attention_norm", "post_attention_layernorm", "norm after attention")[0],
    _pair("post_mlp_norm", "post_feedforward_layernorm", "norm after the MLP")[0],
)


def _to_groups(tensors: Sequence[LazyTensor], sizes: Sizes) -> list[LazyTensor]:
    apart = TRANSFORMS["split_qkv_blocks"].forward(tensors, sizes)
    return TRANSFORMS["split_qkv"].inverse(apart, sizes)


def _from_groups(tensors: Sequence[LazyTensor], sizes: Sizes) -> list[LazyTensor]:
    apart = TRANSFORMS["split_qkv"].forward(tensors, sizes)
    return TRANSFORMS["split_qkv_blocks"].inverse(apart, sizes)


_GATE_UP = TRANSFORMS["split_gate_up"]
_PHI3 = (
    *_outer(),
    *_pair("norm_2", "post_attention_layernorm", "second norm"),
    _pair("attn.qkv", "self_attn.qkv_proj", "attention")[0],
    Rule(
        (f"{_L}.mlp.fc_1.weight", f"{_L}.mlp.fc_2.weight"),
        (f"{_H}.mlp.gate_up_proj.weight",),
        Transform(_GATE_UP.inverse, _GATE_UP.forward),
        "gate|up",
    ),
    *_pair("mlp.proj", "mlp.down_proj", "down"),
)


def _neox() -> tuple[Rule, ...]:
    """GPT-NeoX: every linear layer and norm has a bias."""
    at = "gpt_neox.layers.{i}"
    lines = [
        rule("transformer.wte.weight", "gpt_neox.embed_in.weight", "trim_vocab", "embedding"),
        rule("lm_head.weight", "embed_out.weight", "trim_vocab", "head"),
    ]
    names = (("norm_1", "input_layernorm"), ("norm_2", "post_attention_layernorm"),
             ("attn.proj", "attention.dense"), ("mlp.fc", "mlp.dense_h_to_4h"),
             ("mlp.proj", "mlp.dense_4h_to_h"))  # fmt: skip
    for kind in ("weight", "bias"):
        final = f"gpt_neox.final_layer_norm.{kind}"
        lines.append(rule(f"transformer.ln_f.{kind}", final, "same", f"final norm {kind}"))
        lines += [
            rule(f"{_L}.{a}.{kind}", f"{at}.{b}.{kind}", "same", f"{a} {kind}") for a, b in names
        ]
        target, need = f"{at}.attention.query_key_value.{kind}", f"attention {kind}"
        how = Transform(_to_groups, _from_groups)
        lines.append(rule(f"{_L}.attn.qkv.{kind}", target, how, need))
        lines.append(rule(f"{_L}.attn.attn.{kind}", target, "same", need))
    return tuple(lines)


_VARIANTS = {
    "llama": Variant("LlamaForCausalLM", (*_body(), *_MLP)),
    "mistral": Variant("MistralForCausalLM", (*_body(), *_MLP)),
    "mixtral": Variant("MixtralForCausalLM", (*_body(), *_MOE)),
    "qwen2": Variant("Qwen2ForCausalLM", (*_body(), *_MLP)),
    "qwen3": Variant("Qwen3ForCausalLM", (*_body(), *_MLP, *_NORMS)),
    "qwen3_moe": Variant("Qwen3MoeForCausalLM", (*_body(), *_QWEN_MOE, *_NORMS)),
    "gemma2": Variant(
        "Gemma2ForCausalLM", (*_body("pre_feedforward_layernorm"), *_MLP, *_GEMMA_NORMS)
    ),
    "phi3": Variant("Phi3ForCausalLM", _PHI3),
    "gpt_neox": Variant("GPTNeoXForCausalLM", _neox()),
}


def _settings(ckpt: Checkpoint) -> Settings:
    """Return config.json of ``model_config.yaml``, unless the model has one of its own."""
    path = around(ckpt.path, 0)[0] / FILE
    if (ckpt.config is not None and "model_type" in ckpt.config) or not path.is_file():
        return {}
    return read_config(path)


def _notes(ckpt: Checkpoint) -> tuple[str, ...]:
    if "transformer.h.0.post_mlp_norm.weight" in ckpt.weights and "lm_head.weight" in ckpt.weights:
        return (
            "LitGPT keeps lm_head.weight of Gemma 2 as a tensor of its own: it stays one under "
            "Hugging Face's names, but GGUF has no place for it and takes the embedding, which is "
            "the same unless the head was trained",
        )
    return ()


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
    _settings,
    _foreign,
    buffers=("cos", "sin", "mask_cache"),
    notes=_notes,
).naming
