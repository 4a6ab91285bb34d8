"""More families; see ``tiny_families``."""

from __future__ import annotations

from collections.abc import Mapping

from tiny_families import SIZES, SPM, SPM_JSON, Family

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


def layers(shapes: Mapping[str, tuple[int, ...]], frame: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Return the shapes of two layers and of what is around them; 0 is the number of tokens."""
    inner = {f"model.layers.{n}.{k}.weight": s for n in range(2) for k, s in shapes.items()}
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
FAMILIES: Mapping[str, Family] = {
    "mistral3": Family("Ministral3", "gpt-2", {"rope_parameters": YARN, "head_dim": 32}),
    "seed_oss": Family("SeedOss", "gpt-2", {"head_dim": 32}),
    "arcee": Family("Arcee", "gpt-2"),
    "nemotron": Family("Nemotron", SPM),
    "phi2": Family("Phi", "gpt-2", {"num_key_value_heads": 4, "intermediate_size": 256}),
    "bloom": Family(
        "Bloom",
        "gpt-2",
        {**dict.fromkeys(SIZES), "hidden_size": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1},
        written={"seq_length": 128},
    ),
    "starcoder": Family(
        "GPTBigCode",
        "gpt-2",
        {
            **dict.fromkeys(SIZES),
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
        },
    ),
    "exaone4": Family("Exaone4", "gpt-2", {"sliding_window": 32, "num_hidden_layers": 64}),
    "ernie4_5": Family("Ernie4_5", SPM, {"head_dim": 32}),
    "hunyuan-dense": Family("HunYuanDenseV1", "gpt-2", {"head_dim": 16}),
    "bitnet": Family(
        "BitNet", SPM, {"tie_word_embeddings": True}, exact=("_proj.weight",), official=False
    ),
    "mamba": Family(
        "Mamba", "gpt-2", {**NO_HEADS, "state_size": 8}, tokens=PADDING, exact=("A_log",)
    ),
    "falcon-mamba": Family(
        "FalconMamba", "gpt-2", {**NO_HEADS, "state_size": 8}, tokens=PADDING, exact=("A_log",)
    ),
    "mamba2": Family(
        "Mamba2",
        "gpt-2",
        {**NO_HEADS, "num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
        tokens=PADDING,
        exact=("A_log",),
    ),
    "glm4moe": Family("Glm4Moe", "gpt-2", GLM, tokens=GLM_TOKENS),
    "glm4moe-mtp": Family(
        "Glm4Moe",
        "gpt-2",
        {**GLM, "num_nextn_predict_layers": 1},
        tokens=GLM_TOKENS,
        more=GLM_NEXT,
    ),
    "bitnet-1bitllm": Family(
        "",
        SPM,
        {
            **LLAMA,
            "architectures": ["BitnetForCausalLM"],
            "model_type": "bitnet",
            "tie_word_embeddings": True,
        },
        made=layers(
            {
                **ATTENTION,
                **MLP,
                **LLAMA_NORMS,
                "self_attn.inner_attn_ln": (64,),
                "mlp.ffn_layernorm": (96,),
            },
            {"model.embed_tokens": (0, 64), "model.norm": (64,)},
        ),
        exact=("_proj.weight",),
        mixes=False,
    ),
    "internlm2": Family(
        "",
        SPM,
        {**LLAMA, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"},
        made=layers(
            {
                "attention.wqkv": (128, 64),
                "attention.wo": (64, 64),
                "feed_forward.w1": (96, 64),
                "feed_forward.w2": (64, 96),
                "feed_forward.w3": (96, 64),
                "attention_norm": (64,),
                "ffn_norm": (64,),
            },
            {"model.tok_embeddings": (0, 64), "output": (0, 64), "model.norm": (64,)},
        ),
    ),
    "baichuan": Family(
        "",
        SPM,
        {
            **{k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rope_theta")},
            "architectures": ["BaichuanForCausalLM"],
            "model_type": "baichuan",
        },
        made=layers(
            {
                "self_attn.W_pack": (192, 64),
                "self_attn.o_proj": (64, 64),
                **MLP,
                **LLAMA_NORMS,
            },
            HEAD,
        ),
    ),
    "minicpm": Family(
        "",
        SPM,
        {
            **LLAMA,
            "architectures": ["MiniCPMForCausalLM"],
            "model_type": "minicpm",
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 16,
        },
        made=layers({**ATTENTION, **MLP, **LLAMA_NORMS}, HEAD),
    ),
    "qwen3next": Family("Qwen3Next", "qwen2", LINEAR, more=prediction(MTP_MOE), exact=("A_log",)),
    "qwen35": Family(
        "Qwen3_5",
        "qwen2",
        DENSE_LINEAR,
        written={"mtp_num_hidden_layers": 1},
        more=prediction(MLP),
        base_config="Qwen3_5Text",
        exact=("A_log",),
    ),
    "qwen35moe": Family(
        "Qwen3_5Moe",
        "qwen2",
        {**LINEAR, "intermediate_size": None},
        written={"mtp_num_hidden_layers": 1},
        more=prediction(MTP_MOE),
        base_config="Qwen3_5MoeText",
        exact=("A_log",),
    ),
    "gemma4": Family(
        "Gemma4",
        SPM_JSON,
        {**GEMMA4, "num_kv_shared_layers": 4, "use_double_wide_mlp": True},
        base_config="Gemma4Text",
    ),
    "gemma4-moe": Family(
        "Gemma4",
        SPM_JSON,
        {
            **GEMMA4,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        base_config="Gemma4Text",
    ),
    "cohere2moe": Family(
        "Cohere2Moe",
        "gpt-2",
        {
            "num_hidden_layers": 4,
            "sliding_window": 32,
            "logit_scale": 0.25,
            "num_experts": 4,
            "head_dim": 16,
            "num_shared_experts": 1,
        },
    ),
    "bert": Family(
        "", "bert", {"num_key_value_heads": None}, model="BertModel", base_config="Bert"
    ),
    "xlm-roberta": Family(
        "",
        "xlmr",
        {"num_key_value_heads": None, "pad_token_id": 1, "bos_token_id": 0},
        model="XLMRobertaModel",
        base_config="XLMRoberta",
    ),
    "roberta": Family(
        "",
        "gpt-2",
        {"num_key_value_heads": None, "pad_token_id": 1, "bos_token_id": 0},
        model="RobertaModel",
        base_config="Roberta",
    ),
    "nomic-bert": Family(
        "",
        "bert",
        {
            "architectures": ["NomicBertModel"],
            "model_type": "nomic_bert",
            "n_embd": 64,
            "n_head": 4,
            "n_inner": 96,
            "n_layer": 2,
            "n_positions": 8192,
            "max_trained_positions": 2048,
            "layer_norm_epsilon": 1e-12,
            "rotary_emb_base": 1000,
            "rotary_emb_fraction": 1.0,
            "rotary_emb_interleaved": False,
            "rotary_emb_scale_base": None,
            "type_vocab_size": 2,
            "activation_function": "swiglu",
            "causal": False,
            "prenorm": False,
            "qkv_proj_bias": False,
            "mlp_fc1_bias": False,
            "mlp_fc2_bias": False,
        },
        made={
            "embeddings.word_embeddings.weight": (0, 64),
            "embeddings.token_type_embeddings.weight": (2, 64),
            "emb_ln.weight": (64,),
            "emb_ln.bias": (64,),
            **{
                f"encoder.layers.{n}.{k}": s
                for n in range(2)
                for k, s in {
                    "attn.Wqkv.weight": (192, 64),
                    "attn.out_proj.weight": (64, 64),
                    "mlp.fc11.weight": (96, 64),
                    "mlp.fc12.weight": (96, 64),
                    "mlp.fc2.weight": (64, 96),
                    "norm1.weight": (64,),
                    "norm1.bias": (64,),
                    "norm2.weight": (64,),
                    "norm2.bias": (64,),
                }.items()
            },
        },
    ),
    "t5": Family("", "t5", T5, model="T5ForConditionalGeneration", base_config="T5"),
    "t5-gated": Family(
        "",
        "t5",
        {
            **T5,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        model="T5ForConditionalGeneration",
        base_config="T5",
    ),
    "gemma3n": Family(
        "Gemma3n",
        SPM,
        {
            "head_dim": 16,
            "num_hidden_layers": 10,
            "num_kv_shared_layers": 5,
            "sliding_window": 32,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 31990,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [*([0.95] * 4), *([0.0] * 6)],
        },
        base_config="Gemma3nText",
    ),
}
