"""DeepSeek V2, V2.5, V3, R1 and Kimi-K2 (``general.architecture`` = ``deepseek2``).

Latent attention: llama.cpp runs it as attention with one key-value head of the latent size, so the
up-projection of keys and values is cut in two and its key part transposed. The rotary pairs are
adjacent on both sides. Layers beyond the last (multi-token prediction) are left out.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, boolean, f32, u32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, NORMS, correction_bias, experts, fused_experts, gated_mlp, router
from ._config import rope_parameters
from ._record import Architecture, Config, Default, TensorRule
from ._restore import Stored, restored_rope

_SIGMOID = 2
_ATTENTION = f"{LAYER}.self_attn"


def _extra_keys(config: Config) -> list[KeyValue]:
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    numbers = {
        # attention is on the latent: one key-value head
        "attention.head_count_kv": 1,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "vocab_size": config["vocab_size"],
        "attention.q_lora_rank": config.get("q_lora_rank"),
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config.get("n_shared_experts") or 0,
    }
    keys = [u32(f"deepseek2.{k}", n) for k, n in numbers.items() if n is not None]
    if config.get("routed_scaling_factor") is not None:
        keys.append(f32("deepseek2.expert_weights_scale", config["routed_scaling_factor"]))
    if config.get("norm_topk_prob"):
        keys.append(boolean("deepseek2.expert_weights_norm", True))
    keys.append(u32("deepseek2.rope.dimension_count", rope))
    stretch = rope_parameters(config).get("mscale_all_dim")
    if stretch is not None:
        keys.append(f32("deepseek2.rope.scaling.yarn_log_multiplier", 0.1 * stretch))
    if config.get("model_type") == "deepseek_v3" and config.get("scoring_func") is None:
        keys.append(u32("deepseek2.expert_gating_func", _SIGMOID))  # V3 knows no other
    return keys


def _restore(stored: Stored) -> dict[str, object]:
    rope, third = stored.whole("rope.dimension_count"), "expert_gating_func" in stored.keys
    own: dict[str, object] = {
        "model_type": "deepseek_v3" if third else "deepseek_v2",
        "architectures": [f"DeepseekV{3 if third else 2}ForCausalLM"],
        "num_key_value_heads": stored.whole("attention.head_count"),
        "head_dim": ...,
        "q_lora_rank": stored.keys.get("attention.q_lora_rank"),
        "kv_lora_rank": stored.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": stored.whole("attention.key_length_mla") - rope,
        "v_head_dim": stored.whole("attention.value_length_mla"),
        "first_k_dense_replace": stored.whole("leading_dense_block_count", 0),
        "moe_intermediate_size": stored.whole("expert_feed_forward_length"),
        "n_shared_experts": stored.whole("expert_shared_count", 0) or None,
        "routed_scaling_factor": stored.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(stored.keys.get("expert_weights_norm", False)),
        "attention_bias": stored.has("blk.0.attn_kv_a_mqa.bias"),
    }
    order = list(stored.keys)
    if third and order.index("expert_gating_func") < order.index("rope.dimension_count"):
        own["scoring_func"] = "sigmoid"  # said by the configuration, not by its class
    if not third and stored.keys.get("expert_group_count", 1) != 1:
        own["topk_method"] = "group_limited_greedy"
    if "rope.scaling.yarn_log_multiplier" in stored.keys:
        own["rope_scaling"] = _restored_scaling(stored)
    return own


def _restored_scaling(stored: Stored) -> dict[str, object]:
    scale = round(10 * stored.number("rope.scaling.yarn_log_multiplier"), 6)
    return {**restored_rope(stored)["rope_scaling"], "mscale": scale, "mscale_all_dim": scale}


def _is_moe_layer(config: Config, layer: int) -> bool:
    return bool(
        config.get("n_routed_experts")
        and layer >= config["first_k_dense_replace"]
        and layer % (config.get("moe_layer_freq") or 1) == 0
    )


def _sizes(config: Config) -> dict[str, int]:
    heads, nope, rope = (
        config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    rank, v = config["kv_lora_rank"], config["v_head_dim"]
    return {
        "nope": nope,
        "v": v,
        "q": heads * (nope + rope),
        "q_rank": config.get("q_lora_rank") or 0,
        "kv_rank": rank,
        "kv_a": rank + rope,
        "kv_b": heads * (nope + v),
        "attended": heads * v,
        "shared_ff": config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
    }


def _rule(gguf: str, hf: str, *shape: str, bias: str = "no", needs: str = "") -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_ATTENTION}.{hf}", shape, bias=bias, needs=needs)


_COMMON: dict[str, Default] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "head_dim": lambda config: config["qk_rope_head_dim"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}

ARCHITECTURE = Architecture(
    name="deepseek2",
    classes=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    rope="norm",
    defaults={
        "deepseek_v2": {
            **_COMMON,
            "vocab_size": 102400,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "moe_intermediate_size": 1407,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
        },
        "deepseek_v3": {
            **_COMMON,
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
    },
    sizes=_sizes,
    moe_layer=_is_moe_layer,
    drop_extra_layers=True,
    drop_tied_head=True,
    extra_keys=_extra_keys,
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("bpe",)),
    tensors=(
        *FRAME,
        *NORMS,
        _rule("attn_q", "q_proj", "q", "hidden", needs="!q_lora_rank"),
        _rule("attn_q_a", "q_a_proj", "q_rank", "hidden", bias="maybe", needs="q_lora_rank"),
        _rule("attn_q_a_norm", "q_a_layernorm", "q_rank", needs="q_lora_rank"),
        _rule("attn_q_b", "q_b_proj", "q", "q_rank", needs="q_lora_rank"),
        _rule("attn_kv_a_mqa", "kv_a_proj_with_mqa", "kv_a", "hidden", bias="maybe"),
        _rule("attn_kv_a_norm", "kv_a_layernorm", "kv_rank"),
        TensorRule(
            ("blk.{n}.attn_k_b", "blk.{n}.attn_v_b"),
            f"{_ATTENTION}.kv_b_proj",
            ("kv_b", "kv_rank"),
            "split_kv_b",
        ),
        _rule("attn_output", "o_proj", "hidden", "attended", bias="maybe"),
        *gated_mlp(layers="dense"),
        router(f"{LAYER}.mlp.gate"),
        correction_bias(),
        *experts(),
        *fused_experts(),
        *gated_mlp(
            f"{LAYER}.mlp.shared_experts", "_shexp", "shared_ff", layers="moe",
            needs="n_shared_experts",
        ),
    ),
    notes="multi-token prediction layers are left out",
)  # fmt: skip
