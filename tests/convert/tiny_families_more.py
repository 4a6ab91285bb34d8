"""More families; see ``tiny_families``."""

from __future__ import annotations

from collections.abc import Mapping

from tiny_families import SIZES, SPM, SPM_JSON, Family
from tiny_shapes import (
    ATTENTION,
    DENSE_LINEAR,
    GEMMA4,
    GLM,
    GLM_NEXT,
    GLM_TOKENS,
    HEAD,
    LINEAR,
    LLAMA,
    LLAMA_NORMS,
    MLP,
    MTP_MOE,
    NO_HEADS,
    PADDING,
    QWEN35_ROPE,
    T5,
    YARN,
    layers,
    prediction,
)

#: By which llama.cpp knows that there are rotary embeddings.
BAICHUAN_LAYERS = 32
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
            "num_hidden_layers": BAICHUAN_LAYERS,
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
            BAICHUAN_LAYERS,
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
        {**DENSE_LINEAR, "rope_parameters": QWEN35_ROPE},
        written={"mtp_num_hidden_layers": 1},
        more=prediction(MLP),
        base_config="Qwen3_5Text",
        exact=("A_log",),
    ),
    "qwen35moe": Family(
        "Qwen3_5Moe",
        "qwen2",
        {**LINEAR, "intermediate_size": None, "rope_parameters": QWEN35_ROPE},
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
            "laurel_rank": 64,
            "activation_sparsity_pattern": [0.95] * 10,
        },
        base_config="Gemma3nText",
    ),
}
