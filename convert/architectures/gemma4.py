"""Gemma 4, text (``general.architecture`` = ``gemma4``): local and global layers of two head sizes.

Norm weights are stored whole. Global layers rotate a quarter of each head, spread over both halves:
the other frequencies are divided by a number so large that nothing turns. The last layers may use
the keys and values of others; there may be experts beside the MLP, and an embedding per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..gguf.values import KeyValue, boolean, booleans, f32, i32_array, u32
from ..tokenizers import TokenizerRule, TokenType, Vocabulary
from ._blocks import EMBEDDING, LAYER
from ._config import layer_count, rope_parameters
from ._gemma_like import IGNORED
from ._record import Architecture, Config, ExtraTensor, TensorRule

_STILL = 1e30
_PERIOD = 6
_HEAD = 512  # of global layers, where the configuration does not say
#: Parts of chats that programs read.
_VISIBLE = frozenset(
    {
        "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
        "<tool_response|>", '<|"|>',
    }
)  # fmt: skip


def _layer_types(config: Config) -> list[str]:
    count = layer_count(config)
    kinds = ["sliding_attention" if (n + 1) % _PERIOD else "full_attention" for n in range(count)]
    return [*kinds[:-1], "full_attention"]


def _is_local(config: Config, layer: int) -> bool:
    return bool(config["layer_types"][layer] == "sliding_attention")


def _of_global_layers(config: Config, whole: str, entry: str) -> int | None:
    """Return a setting of global layers: its own entry, or that of the first such layer."""
    if config.get(whole) is not None:
        return int(config[whole])
    for number, settings in (config.get("per_layer_config") or {}).items():
        layer = int(number)
        if layer < layer_count(config) and not _is_local(config, layer) and entry in settings:
            return int(settings[entry])
    return None


def _head(config: Config) -> int:
    """Return the head size of global layers."""
    return _of_global_layers(config, "global_head_dim", "head_dim") or _HEAD


def _first_shared(config: Config) -> int:
    return layer_count(config) - int(config["num_kv_shared_layers"] or 0)


def _layer_tags(config: Config, layer: int) -> tuple[str, ...]:
    wide = config.get("use_double_wide_mlp") and layer >= _first_shared(config)
    return "local" if _is_local(config, layer) else "full", "wide" if wide else "narrow"


def _extra_keys(config: Config) -> list[KeyValue]:
    count, local_head, head = layer_count(config), config["head_dim"], _head(config)
    local = [_is_local(config, n) for n in range(count)]
    keys = []
    if config.get("final_logit_softcapping"):
        keys.append(f32("gemma4.final_logit_softcapping", config["final_logit_softcapping"]))
    numbers = {
        "attention.sliding_window": config["sliding_window"],
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "embedding_length_per_layer_input": config.get("hidden_size_per_layer_input") or 0,
    }
    keys += [u32(f"gemma4.{key}", n) for key, n in numbers.items()]
    keys.append(booleans("gemma4.attention.sliding_window_pattern", local))
    numbers = {
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.key_length_swa": local_head,
        "attention.value_length_swa": local_head,
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
    }
    keys += [u32(f"gemma4.{key}", n) for key, n in numbers.items() if n is not None]
    if config.get("use_double_wide_mlp"):
        ff, first = config["intermediate_size"], _first_shared(config)
        wide = [ff if n < first else 2 * ff for n in range(count)]
        keys.append(i32_array("gemma4.feed_forward_length", wide))
    few = _of_global_layers(config, "num_global_key_value_heads", "num_key_value_heads")
    if few is not None:
        kv = [config["num_key_value_heads"] if near else few for near in local]
        keys.append(i32_array("gemma4.attention.head_count_kv", kv))
    share = config["rope_parameters"].get("partial_rotary_factor", 1.0)
    return [
        *keys,
        u32("gemma4.rope.dimension_count", head),
        u32("gemma4.rope.dimension_count_swa", int(local_head * share)),
    ]


def _rope_freqs(config: Config) -> np.ndarray:
    """Return float32 [head / 2] divisors for global layers: 1 where dims turn."""
    rope, head = rope_parameters(config), _head(config)
    turning = int(head * rope.get("partial_rotary_factor", 1.0) / 2)
    still = head // 2 - turning
    return np.array([1.0] * turning + [_STILL] * still, np.float32)


def _sizes(config: Config) -> dict[str, int]:
    heads, head = config["num_attention_heads"], _head(config)
    few = _of_global_layers(config, "num_global_key_value_heads", "num_key_value_heads")
    per_layer = config.get("hidden_size_per_layer_input") or 0
    moe_ff = config.get("moe_intermediate_size") or 0
    return {
        "experts": config.get("num_experts") or 0,
        "2moe_ff": 2 * moe_ff,
        "moe_ff": moe_ff,
        "full_head": head,
        "full_q": heads * head,
        "full_kv": (few or config["num_key_value_heads"]) * head,
        "wide_ff": 2 * config["intermediate_size"],
        "per_layer": per_layer,
        "all_layers": per_layer * layer_count(config),
        "vocab_per_layer": config.get("vocab_size_per_layer_input") or config["vocab_size"],
        "one": 1,
    }


def _rule(gguf: str, hf: str, *shape: str, layers: str = "", optional: bool = False) -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{LAYER}.{hf}", shape, layers=layers, optional=optional)


def _adjust_vocabulary(vocabulary: Vocabulary, config: Config) -> Vocabulary:
    """Let the tokens of chats be seen; say that the start is added and no space is."""
    types = list(vocabulary.types)
    for index, token in enumerate(vocabulary.tokens):
        if token in _VISIBLE:
            types[index] = TokenType.USER_DEFINED
    more = (
        boolean("tokenizer.ggml.add_space_prefix", False),
        boolean("tokenizer.ggml.add_bos_token", True),
    )
    return replace(vocabulary, types=types, extra=(*vocabulary.extra, *more))


def _adjust_entries(entries: Sequence[KeyValue]) -> list[KeyValue]:
    """The kind of tokenizer says how text is split."""
    return [entry for entry in entries if entry.key != "tokenizer.ggml.pre"]


def _attention() -> tuple[TensorRule, ...]:
    """Return attention; layers that use other keys and values may come without their own."""
    rules: list[TensorRule] = []
    for tag, pre in (("local", ""), ("full", "full_")):
        q, kv, head = f"{pre}q", f"{pre}kv", f"{pre}head"
        rules += [
            _rule("attn_q", "self_attn.q_proj", q, "hidden", layers=tag),
            _rule("attn_k", "self_attn.k_proj", kv, "hidden", layers=tag, optional=True),
            _rule("attn_v", "self_attn.v_proj", kv, "hidden", layers=tag, optional=True),
            _rule("attn_output", "self_attn.o_proj", "hidden", q, layers=tag),
            _rule("attn_q_norm", "self_attn.q_norm", head, layers=tag),
            _rule("attn_k_norm", "self_attn.k_norm", head, layers=tag, optional=True),
        ]
    return tuple(rules)


def _mlp() -> tuple[TensorRule, ...]:
    return tuple(
        _rule(f"ffn_{name}", f"mlp.{name}_proj", *shape, layers=tag)
        for tag, ff in (("narrow", "ff"), ("wide", "wide_ff"))
        for name, shape in (
            ("gate", (ff, "hidden")), ("up", (ff, "hidden")), ("down", ("hidden", ff)),
        )
    )  # fmt: skip


def _moe(gguf: str, hf: str, *shape: str, exact: bool = False, keep: bool = False) -> TensorRule:
    return TensorRule(
        f"blk.{{n}}.{gguf}", f"{LAYER}.{hf}", shape, exact=exact, keep_f32=keep,
        needs="enable_moe_block",
    )  # fmt: skip


def _per_layer(gguf: str, hf: str, *shape: str) -> TensorRule:
    return TensorRule(gguf, hf, shape, needs="hidden_size_per_layer_input")


ARCHITECTURE = Architecture(
    name="gemma4",
    classes=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    composite=("Gemma4ForConditionalGeneration",),
    rope="neox",
    defaults={
        "gemma4_text": {
            "vocab_size": 262144,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 30,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": lambda config: {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000000.0,
                },
            },
            "sliding_window": 512,
            "layer_types": _layer_types,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262144,
            "num_kv_shared_layers": 0,
            "enable_moe_block": False,
            "use_double_wide_mlp": False,
            "tie_word_embeddings": True,
        },
    },
    sizes=_sizes,
    layer_tags=_layer_tags,
    moe_layer=lambda config, layer: bool(config.get("enable_moe_block")),
    ignored=IGNORED,
    extra_keys=_extra_keys,
    extra_tensors=(ExtraTensor("rope_freqs.weight", _rope_freqs),),
    adjust_vocabulary=_adjust_vocabulary,
    adjust_entries=_adjust_entries,
    tokenizer=TokenizerRule(kinds=("gemma4",)),
    tensors=(
        EMBEDDING,
        TensorRule("output_norm", "model.norm", ("hidden",)),
        _per_layer(
            "per_layer_token_embd", "model.embed_tokens_per_layer", "vocab_per_layer", "all_layers"
        ),
        _per_layer(
            "per_layer_model_proj", "model.per_layer_model_projection", "all_layers", "hidden"
        ),
        _per_layer("per_layer_proj_norm", "model.per_layer_projection_norm", "per_layer"),
        _rule("attn_norm", "input_layernorm", "hidden"),
        _rule("post_attention_norm", "post_attention_layernorm", "hidden"),
        _rule("ffn_norm", "pre_feedforward_layernorm", "hidden"),
        _rule("post_ffw_norm", "post_feedforward_layernorm", "hidden"),
        TensorRule(
            "blk.{n}.layer_output_scale.weight", f"{LAYER}.layer_scalar", ("one",), exact=True,
            optional=True,
        ),
        *_attention(),
        *_mlp(),
        _per_layer("blk.{n}.inp_gate", f"{LAYER}.per_layer_input_gate", "per_layer", "hidden"),
        _per_layer("blk.{n}.proj", f"{LAYER}.per_layer_projection", "hidden", "per_layer"),
        _per_layer("blk.{n}.post_norm", f"{LAYER}.post_per_layer_input_norm", "hidden"),
        _moe("ffn_gate_inp", "router.proj", "experts", "hidden", keep=True),
        _moe("ffn_gate_inp.scale", "router.scale", "hidden", exact=True),
        _moe("ffn_down_exps.scale", "router.per_expert_scale", "experts", exact=True),
        _moe(
            "ffn_gate_up_exps.weight", "experts.gate_up_proj", "experts", "2moe_ff", "hidden",
            exact=True,
        ),
        _moe(
            "ffn_down_exps.weight", "experts.down_proj", "experts", "hidden", "moe_ff", exact=True
        ),
        _moe("pre_ffw_norm_2", "pre_feedforward_layernorm_2", "hidden"),
        _moe("post_ffw_norm_1", "post_feedforward_layernorm_1", "hidden"),
        _moe("post_ffw_norm_2", "post_feedforward_layernorm_2", "hidden"),
    ),
    notes="text only: towers for images and sound are left out",
)  # fmt: skip
