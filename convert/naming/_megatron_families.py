"""The model families that Megatron trains, as tables: one line per tensor, one per setting.

Left: mcore names as ``shardio/megatron/names.py`` spells them; right: Hugging Face, as on the hub
(one tensor per expert). Checked by logits of Megatron models against transformers. A family is
recognised by traits that can be seen in the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .table import Rule, rule

_L, _H = "decoder.layers.{i}", "model.layers.{i}"

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """A Hugging Face model type.

    Attributes:
        model_type, architecture: as in config.json.
        traits: what its tensors show; the first family whose traits all hold is taken.
        rules: tensor names.
        keys: (config.json key, Megatron setting); ``a|b``: the first that is set.
        config: entries of config.json that hold unless a setting says otherwise.
        args: further constant Megatron settings.
    """

    model_type: str
    architecture: str
    traits: Mapping[str, object]
    rules: tuple[Rule, ...]
    keys: Pairs
    config: Mapping[str, object] = field(default_factory=dict)
    args: Mapping[str, object] = field(default_factory=dict)


def _with_bias(left: str, right: str, how: str, need: str) -> tuple[Rule, Rule]:
    """A weight that every layer has, and a bias that some models have."""
    return (
        rule(f"{left}.weight", f"{right}.weight", how, need),
        rule(f"{left}.bias", f"{right}.bias", how),
    )


def _gated(left: str, right: str, names: tuple[str, str, str], need: str = "") -> tuple[Rule, ...]:
    """A gated MLP: fc1 is [gate ; up]."""
    gate, up, down = (f"{right}.{n}" for n in names)
    first, second = (f"{need} up", f"{need} down") if need else ("", "")
    return (
        rule(
            f"{left}.linear_fc1.weight", (f"{gate}.weight", f"{up}.weight"), "split_gate_up", first
        ),
        rule(f"{left}.linear_fc1.bias", (f"{gate}.bias", f"{up}.bias"), "split_gate_up"),
        rule(f"{left}.linear_fc2.weight", f"{down}.weight", "same", second),
        rule(f"{left}.linear_fc2.bias", f"{down}.bias"),
    )


_PROJ = ("gate_proj", "up_proj", "down_proj")
_EXPERTS = f"{_L}.mlp.experts.local_experts.{{e}}"

_FRAME = (
    rule(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", "trim_vocab", "embedding"
    ),
    rule("output_layer.weight", "lm_head.weight", "trim_vocab", "head"),
    *_with_bias("decoder.final_layernorm", "model.norm", "norm", "final norm"),
    *_with_bias(f"{_L}.input_layernorm", f"{_H}.input_layernorm", "norm", "attention norm"),
    *_with_bias(f"{_L}.pre_mlp_layernorm", f"{_H}.post_attention_layernorm", "norm", "MLP norm"),
)
_ATTENTION = (
    *(
        rule(
            f"{_L}.self_attention.linear_qkv.{part}",
            tuple(f"{_H}.self_attn.{x}_proj.{part}" for x in "qkv"),
            "split_qkv",
            need,
        )
        for part, need in (("weight", "attention QKV"), ("bias", ""))
    ),
    *_with_bias(
        f"{_L}.self_attention.linear_proj", f"{_H}.self_attn.o_proj", "same", "attention output"
    ),
    rule(f"{_L}.self_attention.q_layernorm.weight", f"{_H}.self_attn.q_norm.weight", "norm"),
    rule(f"{_L}.self_attention.k_layernorm.weight", f"{_H}.self_attn.k_norm.weight", "norm"),
)
_LATENT_ATTENTION = tuple(
    rule(f"{_L}.self_attention.{left}.weight", f"{_H}.self_attn.{right}.weight", how, need)
    for left, right, how, need in (
        ("linear_q_proj", "q_proj", "same", "query projection|query down projection|query norm"),
        ("linear_q_down_proj", "q_a_proj", "same", "query down projection"),
        ("q_layernorm", "q_a_layernorm", "norm", "query norm"),
        ("linear_q_up_proj", "q_b_proj", "same", "query projection"),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa", "same", "key/value down projection"),
        ("kv_layernorm", "kv_a_layernorm", "norm", "key/value norm"),
        ("linear_kv_up_proj", "kv_b_proj", "same", "key/value up projection"),
        ("linear_proj", "o_proj", "same", "attention output"),
    )
)
_DENSE = _gated(f"{_L}.mlp", f"{_H}.mlp", _PROJ, "MLP router|MLP")  # a dense layer needs no router
_MOE = (
    *_gated(_EXPERTS, f"{_H}.mlp.experts.{{e}}", _PROJ, "MLP"),
    rule(f"{_L}.mlp.router.weight", f"{_H}.mlp.gate.weight", "same", "MLP router"),
)

_KEYS: Pairs = (
    ("hidden_size", "hidden_size"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "num_attention_heads"),
    ("num_key_value_heads", "num_query_groups"),
    ("head_dim", "kv_channels"),
    ("intermediate_size", "ffn_hidden_size"),
    ("max_position_embeddings", "max_position_embeddings|seq_length"),
    ("rms_norm_eps", "layernorm_epsilon|norm_epsilon"),
    ("rope_theta", "rotary_base"),
)
_EXPERT_KEYS: Pairs = (
    ("num_experts", "num_experts"),
    ("num_experts_per_tok", "moe_router_topk"),
    ("moe_intermediate_size", "moe_ffn_hidden_size|ffn_hidden_size"),
)
_LATENT_KEYS: Pairs = (
    *(pair for pair in _KEYS if pair[0] not in ("head_dim", "num_key_value_heads")),
    ("num_key_value_heads", "num_attention_heads"),
    ("n_routed_experts", "num_experts"),
    *_EXPERT_KEYS[1:],
    ("q_lora_rank", "q_lora_rank"),
    ("kv_lora_rank", "kv_lora_rank"),
    ("qk_nope_head_dim", "qk_head_dim"),
    ("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    ("v_head_dim", "v_head_dim"),
    ("n_group", "moe_router_num_groups"),
    ("topk_group", "moe_router_group_topk"),
    ("routed_scaling_factor", "moe_router_topk_scaling_factor"),
    ("scoring_func", "moe_router_score_function"),
)
_MODERN: Mapping[str, object] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
}
_SILU: Mapping[str, object] = {"hidden_act": "silu"}

FAMILIES: tuple[Family, ...] = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {"learned positions": True, "gated": False, "norm bias": True},
        (
            rule(
                "embedding.word_embeddings.weight",
                "transformer.wte.weight",
                "trim_vocab",
                "embedding",
            ),
            rule(
                "embedding.position_embeddings.weight",
                "transformer.wpe.weight",
                "same",
                "positions",
            ),
            rule("output_layer.weight", "lm_head.weight", "trim_vocab", "head"),
            *(
                rule(f"{left}.{part}", f"{right}.{part}", how, need)
                for part in ("weight", "bias")
                for left, right, how, need in (
                    ("decoder.final_layernorm", "transformer.ln_f", "norm", f"final norm {part}"),
                    (
                        f"{_L}.input_layernorm",
                        "transformer.h.{i}.ln_1",
                        "norm",
                        f"attention norm {part}",
                    ),
                    (
                        f"{_L}.pre_mlp_layernorm",
                        "transformer.h.{i}.ln_2",
                        "norm",
                        f"MLP norm {part}",
                    ),
                    (
                        f"{_L}.self_attention.linear_qkv",
                        "transformer.h.{i}.attn.c_attn",
                        "conv_qkv",
                        f"attention QKV {part}",
                    ),
                    (
                        f"{_L}.self_attention.linear_proj",
                        "transformer.h.{i}.attn.c_proj",
                        "transpose",
                        f"attention output {part}",
                    ),
                    (
                        f"{_L}.mlp.linear_fc1",
                        "transformer.h.{i}.mlp.c_fc",
                        "transpose",
                        f"MLP up {part}",
                    ),
                    (
                        f"{_L}.mlp.linear_fc2",
                        "transformer.h.{i}.mlp.c_proj",
                        "transpose",
                        f"MLP down {part}",
                    ),
                )
            ),
        ),
        (
            ("n_embd", "hidden_size"),
            ("n_layer", "num_layers"),
            ("n_head", "num_attention_heads"),
            ("n_inner", "ffn_hidden_size"),
            ("n_positions", "max_position_embeddings|seq_length"),
            ("layer_norm_epsilon", "layernorm_epsilon|norm_epsilon"),
        ),
        args={
            "normalization": "LayerNorm",
            "swiglu": False,
            "position_embedding_type": "learned_absolute",
            "add_bias_linear": True,
        },
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {"latent attention": True, "router bias": True},
        (
            *_FRAME,
            *_LATENT_ATTENTION,
            *_DENSE,
            *_MOE,
            rule(f"{_L}.mlp.router.expert_bias", f"{_H}.mlp.gate.e_score_correction_bias"),
            *_gated(f"{_L}.mlp.shared_experts", f"{_H}.mlp.shared_experts", _PROJ),
        ),
        _LATENT_KEYS,
        {
            **_SILU,
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "rope_interleave": True,
            "n_group": 1,
            "topk_group": 1,
        },
        {**_MODERN, "multi_latent_attention": True, "moe_router_enable_expert_bias": True},
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {"latent attention": True, "router bias": False},
        (
            *_FRAME,
            *_LATENT_ATTENTION,
            *_DENSE,
            *_MOE,
            *_gated(f"{_L}.mlp.shared_experts", f"{_H}.mlp.shared_experts", _PROJ),
        ),
        _LATENT_KEYS,
        _SILU,
        {**_MODERN, "multi_latent_attention": True},
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {"experts": True, "shared expert gate": True},
        (
            *_FRAME,
            *_ATTENTION,
            *_DENSE,
            *_MOE,
            *_gated(f"{_L}.mlp.shared_experts", f"{_H}.mlp.shared_expert", _PROJ),
            rule(f"{_L}.mlp.shared_experts.gate_weight", f"{_H}.mlp.shared_expert_gate.weight"),
        ),
        (
            *_KEYS,
            *_EXPERT_KEYS,
            ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        ),
        {**_SILU, "decoder_sparse_step": 1},
        {**_MODERN, "add_qkv_bias": True},
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"experts": True, "query norm": True, "shared experts": False},
        (*_FRAME, *_ATTENTION, *_DENSE, *_MOE),
        (*_KEYS, *_EXPERT_KEYS),
        {**_SILU, "decoder_sparse_step": 1, "attention_bias": False},
        {**_MODERN, "qk_layernorm": True},
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        {"experts": True, "gated": True, "query norm": False, "shared experts": False},
        (
            *_FRAME,
            *_ATTENTION,
            *_gated(_EXPERTS, f"{_H}.block_sparse_moe.experts.{{e}}", ("w1", "w3", "w2"), "MLP"),
            rule(
                f"{_L}.mlp.router.weight",
                f"{_H}.block_sparse_moe.gate.weight",
                "same",
                "MLP router",
            ),
        ),
        (
            *(pair for pair in _KEYS if pair[0] != "intermediate_size"),
            ("num_local_experts", "num_experts"),
            ("num_experts_per_tok", "moe_router_topk"),
            ("intermediate_size", "moe_ffn_hidden_size|ffn_hidden_size"),
        ),
        _SILU,
        _MODERN,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {"experts": False, "gated": True, "query norm": True},
        (*_FRAME, *_ATTENTION, *_DENSE),
        _KEYS,
        {**_SILU, "attention_bias": False},
        {**_MODERN, "qk_layernorm": True},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        {"experts": False, "gated": True, "QKV bias": True, "other biases": False},
        (*_FRAME, *_ATTENTION, *_DENSE),
        _KEYS,
        _SILU,
        {**_MODERN, "add_qkv_bias": True},
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        {"experts": False, "gated": True, "norm bias": False, "learned positions": False},
        (*_FRAME, *_ATTENTION, *_DENSE),
        _KEYS,
        _SILU,
        _MODERN,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        {"never": True},  # same tensors as llama: only when asked for
        (*_FRAME, *_ATTENTION, *_DENSE),
        _KEYS,
        {**_SILU, "sliding_window": None},
        _MODERN,
    ),
)
