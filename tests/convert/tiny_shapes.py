"""Settings and shapes of ``tiny_families_more``."""

from __future__ import annotations

from collections.abc import Mapping

from tiny_families import SIZES

Shapes = dict[str, tuple[int, ...]]

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
GLM = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 1.5,
    "attention_bias": True,
}
GLM_TOKENS = ("<|user|>", "[gMASK]", "<|observation|>")
PADDING = tuple(f"<pad{i}>" for i in range(7))  # to a multiple of 16
NO_HEADS = dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "intermediate_size")
)
LLAMA = {
    **SIZES,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def layers(
    shapes: Mapping[str, tuple[int, ...]], frame: Mapping[str, tuple[int, ...]], count: int = 2
) -> Shapes:
    """Return the shapes of layers and of what is around them; 0 is the number of tokens."""
    inner = {f"model.layers.{n}.{k}.weight": s for n in range(count) for k, s in shapes.items()}
    return {**inner, **{f"{k}.weight": s for k, s in frame.items()}}


HEAD = {"model.embed_tokens": (0, 64), "lm_head": (0, 64), "model.norm": (64,)}
MLP = {"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
LLAMA_NORMS = {"input_layernorm": (64,), "post_attention_layernorm": (64,)}
ATTENTION = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
}
NEXT = "model.layers.2"
GLM_NEXT = {
    **{f"{NEXT}.{k}.weight": s for k, s in {**ATTENTION, **LLAMA_NORMS}.items()},
    **{f"{NEXT}.self_attn.{k}_proj.bias": (n,) for k, n in (("q", 64), ("k", 32), ("v", 32))},
    **{f"{NEXT}.self_attn.{k}_norm.weight": (16,) for k in "qk"},
    **{
        f"{NEXT}.mlp.{at}.{k}_proj.weight": (64, 32) if k == "down" else (32, 64)
        for at in ("experts.0", "experts.1", "experts.2", "experts.3", "shared_experts")
        for k in ("gate", "up", "down")
    },
    f"{NEXT}.mlp.gate.weight": (4, 64),
    f"{NEXT}.mlp.gate.e_score_correction_bias": (4,),
    f"{NEXT}.embed_tokens.weight": (0, 64),
    f"{NEXT}.shared_head.head.weight": (0, 64),
    f"{NEXT}.shared_head.norm.weight": (64,),
    f"{NEXT}.enorm.weight": (64,),
    f"{NEXT}.hnorm.weight": (64,),
    f"{NEXT}.eh_proj.weight": (64, 128),
}
LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
QWEN35_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
DENSE_LINEAR = {k: v for k, v in LINEAR.items() if "expert" not in k and "moe" not in k}
MTP = {
    "self_attn.q_proj": (128, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "self_attn.q_norm": (16,),
    "self_attn.k_norm": (16,),
    **LLAMA_NORMS,
}
MTP_FRAME = {
    "fc": (64, 128), "norm": (64,), "pre_fc_norm_embedding": (64,), "pre_fc_norm_hidden": (64,),
}  # fmt: skip
MTP_MOE = {
    "mlp.gate": (4, 64),
    "mlp.shared_expert_gate": (1, 64),
    **{
        f"mlp.{at}.{k}_proj": (64, 32) if k == "down" else (32, 64)
        for at in ("experts.0", "experts.1", "experts.2", "experts.3", "shared_expert")
        for k in ("gate", "up", "down")
    },
}


def prediction(mlp: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Return the tensors of a layer of multi-token prediction of Qwen."""
    inner = {f"layers.0.{k}": s for k, s in {**MTP, **mlp}.items()}
    return {f"mtp.{k}.weight": s for k, s in {**inner, **MTP_FRAME}.items()}


GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000.0,
    },
}
GEMMA4 = {
    "head_dim": 16,
    "num_hidden_layers": 8,
    "rope_parameters": GEMMA4_ROPE,
    "sliding_window": 32,
    "layer_types": [*(["sliding_attention"] * 3), "full_attention"] * 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 32000,
    "final_logit_softcapping": 30.0,  # llama.cpp has it where nothing is said
    "per_layer_config": {"03": {"head_dim": 32}, "07": {"head_dim": 32}},
}
T5 = {
    **dict.fromkeys(SIZES),
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "n_positions": 128,
}
