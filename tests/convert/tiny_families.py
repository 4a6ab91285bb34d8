"""How transformers makes a tiny model of every family; see ``tiny_archs``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SPM, SPM_JSON = "spm", "spm.json"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """How a tiny model is made.

    Attributes:
        base: transformers' class without ``ForCausalLM``.
        vocab: name of the vocabulary, or SPM.
        config: changes to the usual sizes; None takes an entry away.
        written: entries of config.json as the hub has them, where transformers writes others.
        model: model class, where it is another.
        base_config: the same for the configuration.
        tokens: special tokens that the tokenizer must have.
        mxfp4: the experts are quantized as on the hub.
        mixes: digests of mixes are made too. Not where llama.cpp's converter has rounded computed
            values to 16 bits before.
        more: shapes of tensors that the hub has and transformers does not save.
        made: shapes of all tensors, of a family that transformers does not know; ``config`` is
            all of its configuration then.
        exact: endings of the names of tensors whose values need to be few and round, because
            llama.cpp's converter calculates with them.
        official: llama.cpp's own converter can convert it.
    """

    base: str
    vocab: str
    config: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    base_config: str = ""
    tokens: tuple[str, ...] = ()
    official: bool = True
    mxfp4: bool = False
    mixes: bool = True
    more: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    made: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    exact: tuple[str, ...] = ()


MLA = {
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
}
SCALES = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
FAMILIES: Mapping[str, Family] = {
    "mixtral": Family("Mixtral", "gpt-2", {"num_local_experts": 12}),
    "qwen3moe": Family(
        "Qwen3Moe",
        "qwen2",
        {
            "num_experts": 12,
            "moe_intermediate_size": 32,
            "num_experts_per_tok": 3,
            "head_dim": 32,
            "norm_topk_prob": True,
            "hidden_size": 256,
        },
    ),
    "qwen2moe": Family(
        "Qwen2Moe",
        "qwen2",
        {
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "gemma2": Family("Gemma2", SPM, {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": Family(
        "Gemma3",
        SPM,
        {"head_dim": 16, "num_hidden_layers": 7, "query_pre_attn_scalar": 16, "sliding_window": 32},
        base_config="Gemma3Text",
    ),
    "gemma": Family("Gemma", SPM, {"head_dim": 16}),
    "phi3": Family("Phi3", SPM, {"sliding_window": 64}),
    "phi3-long": Family(
        "Phi3",
        SPM,
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
                "short_factor": [1.0, 1.0, 1.0, 1.25, 1.25, 1.5, 1.5, 1.5],
            },
        },
    ),
    "gpt2": Family(
        "GPT2",
        "gpt-2",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            **dict.fromkeys(SIZES),
            "bos_token_id": 1,
        },
        written={"n_ctx": 128},
        model="GPT2LMHeadModel",
    ),
    "gptneox": Family(
        "GPTNeoX",
        "gpt-2",
        {"num_key_value_heads": None, "pad_token_id": None},
        written={"rotary_pct": 0.25},
    ),
    # llama.cpp knows models without q_lora_rank by their 27 layers
    "deepseek2": Family(
        "DeepseekV2", "deepseek-llm", {**MLA, "q_lora_rank": None, "num_hidden_layers": 27}
    ),
    "deepseek2-v3": Family(
        "DeepseekV3",
        "deepseek-llm",
        {
            **MLA,
            "q_lora_rank": 16,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "hidden_size": 256,
            "moe_intermediate_size": 256,
        },
        written={"scoring_func": "sigmoid"},
    ),
    "olmo2": Family("Olmo2", "gpt-2"),
    "olmo3": Family("Olmo3", "gpt-2", {"num_hidden_layers": 4, "sliding_window": 32}),
    "olmo": Family("Olmo", "gpt-2", {"clip_qkv": 3.0}),
    "olmoe": Family(
        "Olmoe", "gpt-2", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    ),
    "granite": Family("Granite", "starcoder", SCALES),
    "granitemoe": Family("GraniteMoe", "starcoder", {**SCALES, "num_local_experts": 4}),
    "granitemoe-shared": Family(
        "GraniteMoeShared",
        "starcoder",
        {**SCALES, "num_local_experts": 4, "shared_intermediate_size": 64},
    ),
    "starcoder2": Family("Starcoder2", "starcoder"),
    "stablelm": Family("StableLm", "qwen2", {"use_qkv_bias": True}),
    "stablelm-12b": Family(
        "StableLm",
        "qwen2",
        {
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "num_attention_heads": 12,
            "hidden_size": 192,
        },
        official=False,  # it loses the norms of the heads
    ),
    "smollm3": Family("SmolLM3", "gpt-2", {"num_hidden_layers": 5}),
    "falcon": Family(
        "Falcon",
        "gpt-2",
        {
            **dict.fromkeys(("intermediate_size", "num_key_value_heads", "pad_token_id")),
            "multi_query": True,
        },
        written={"num_kv_heads": 1},
    ),
    "falcon-40b": Family(
        "Falcon",
        "gpt-2",
        {
            **dict.fromkeys(("intermediate_size", "num_key_value_heads", "pad_token_id")),
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
    ),
    "glm4": Family(
        "Glm4",
        "gpt-2",
        {"head_dim": 16, "attention_bias": True},
        tokens=("<|user|>",),
    ),
    "command-r": Family("Cohere", "gpt-2", {"logit_scale": 0.25}),
    # llama.cpp looks for norms of the heads in models of 64 layers
    "command-r-plus": Family(
        "Cohere",
        "gpt-2",
        {"logit_scale": 0.25, "use_qk_norm": True, "num_hidden_layers": 64},
    ),
    "cohere2": Family(
        "Cohere2",
        "gpt-2",
        {"num_hidden_layers": 4, "sliding_window": 32, "logit_scale": 0.25},
        written={"rotary_pct": 1.0},
    ),
    "llama4": Family(
        "Llama4",
        "gpt-2",
        {
            "num_local_experts": 4,
            "num_hidden_layers": 4,
            "interleave_moe_layer_step": 2,
            "head_dim": 16,
            "intermediate_size_mlp": 160,
        },
        base_config="Llama4Text",
    ),
    "gpt-oss": Family(
        "GptOss",
        "gpt-2",
        {
            "num_local_experts": 4,
            "head_dim": 32,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
            "hidden_size": 256,
            "intermediate_size": 256,
        },
    ),
    "gpt-oss-mxfp4": Family(
        "GptOss",
        "gpt-2",
        {
            "num_local_experts": 4,
            "head_dim": 32,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
            "hidden_size": 256,
            "intermediate_size": 256,
        },
        mxfp4=True,
    ),
}
