"""The order in which Hugging Face models register their parameters, from names alone.

torch optimizers number parameters, and ZeRO joins them, in that order, while safetensors files sort
by name. For the usual decoder layouts it follows from the names: the module lists of transformers'
modeling files, checked against the models themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

_WORDS = (  # as LlamaModel and its many relatives register them
    "model", "embed_tokens", "layers",
    "self_attn", "sinks", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa",
    "kv_a_layernorm", "kv_b_proj", "q_proj", "k_proj", "v_proj", "o_proj", "dense", "q_norm",
    "k_norm",
    "mlp", "block_sparse_moe", "gate", "experts", "w1", "w2", "w3", "gate_proj", "up_proj",
    "down_proj", "fc1", "fc2", "c_fc", "c_proj", "shared_experts", "shared_expert",
    "shared_expert_gate",
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "norm", "final_layernorm", "lm_head", "weight", "bias",
)  # fmt: skip
_GPT2 = (
    "transformer", "wte", "wpe", "h", "ln_1", "attn", "c_attn", "ln_2", "mlp", "c_fc", "c_proj",
    "ln_f", "lm_head", "weight", "bias",
)  # fmt: skip
_NEOX = (
    "gpt_neox", "embed_in", "layers", "input_layernorm", "post_attention_layernorm", "attention",
    "query_key_value", "mlp", "dense_h_to_4h", "dense_4h_to_h", "dense", "final_layer_norm",
    "embed_out", "lm_head", "weight", "bias",
)  # fmt: skip


def by_registration(names: Iterable[str]) -> list[str] | None:
    """Return the names in the order of the model, or None where they do not tell it."""
    known = list(names)
    for words in (_WORDS, _GPT2, _NEOX):
        keys = {name: _key(name, words) for name in known}
        if all(key is not None for key in keys.values()):
            return sorted(known, key=lambda n: keys[n] or ())
    return None


def _key(name: str, words: tuple[str, ...]) -> tuple[int, ...] | None:
    """Rank of each part of a name; numbers count, words go by their list."""
    found = []
    for part in name.split("."):
        if part.isdigit():
            found.append(int(part))
        elif part in words:
            found.append(words.index(part))
        else:
            return None
    return tuple(found)
