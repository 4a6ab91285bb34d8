"""InternLM 2 and 2.5 (``general.architecture`` = ``internlm2``): Llama with a fused q|k|v.

It comes group by group (query heads, then their key and value). Rotary pairs are adjacent in
llama.cpp, so query and key rows are permuted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..gguf.values import KeyValue, boolean
from ..tokenizers import TokenizerRule, TokenType, Vocabulary
from ._record import Architecture, Config, TensorRule, heads

_LAYER = "model.layers.{n}"
_NULL = (b"\x00", "\x00")  # would end the text in C
_DRAGON = "🐉"
_CHAT_END = "<|im_end|>"
_PREFIX = "tokenizer.ggml.add_space_prefix"


def _text(token: str | bytes) -> str:
    return token.decode("utf-8", "replace") if isinstance(token, bytes) else token


def _adjust_vocabulary(vocabulary: Vocabulary, config: Config) -> Vocabulary:
    """Name the null token, mark reserved ones as unused, let the chat token end a text."""
    tokens = [_DRAGON.encode() if t in _NULL else _bytes(t) for t in vocabulary.tokens]
    types = np.array(vocabulary.types)
    for i, token in enumerate(tokens):
        if token.startswith(b"[UNUSED") and types[i] == TokenType.NORMAL:
            types[i] = TokenType.UNUSED
    ids = dict(vocabulary.specials.ids)
    added = {_text(t): i for i, t in enumerate(tokens) if types[i] != TokenType.NORMAL}
    if _CHAT_END in added:
        ids["eos"] = added[_CHAT_END]
    specials = replace(vocabulary.specials, ids=ids)
    return replace(vocabulary, tokens=tokens, types=types.tolist(), specials=specials)


def _bytes(token: str | bytes) -> bytes:
    return token.encode() if isinstance(token, str) else token


def _adjust_entries(entries: Sequence[KeyValue]) -> list[KeyValue]:
    """Say after the token types that a space is put before the text."""
    out = []
    for entry in entries:
        if entry.key != _PREFIX:
            out.append(entry)
        if entry.key == "tokenizer.ggml.token_type":
            out.append(boolean(_PREFIX, True))
    return out


def _linear(gguf: str, hf: str, *shape: str) -> TensorRule:
    return TensorRule(f"blk.{{n}}.{gguf}", f"{_LAYER}.{hf}", shape, bias="maybe")


ARCHITECTURE = Architecture(
    name="internlm2",
    classes=("InternLM2ForCausalLM",),
    rope="norm",
    defaults={
        "internlm2": {
            "vocab_size": 103168,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
    },
    adjust_vocabulary=_adjust_vocabulary,
    adjust_entries=_adjust_entries,
    tokenizer=TokenizerRule(kinds=("spm",)),
    tensors=(
        TensorRule("token_embd", "model.tok_embeddings", ("vocab", "hidden")),
        TensorRule("output", "output", ("vocab", "hidden")),
        TensorRule("output_norm", "model.norm", ("hidden",)),
        TensorRule("blk.{n}.attn_norm", f"{_LAYER}.attention_norm", ("hidden",)),
        TensorRule("blk.{n}.ffn_norm", f"{_LAYER}.ffn_norm", ("hidden",)),
        TensorRule(
            ("blk.{n}.attn_q", "blk.{n}.attn_k", "blk.{n}.attn_v"),
            f"{_LAYER}.attention.wqkv",
            ("qkv", "hidden"),
            "ungroup_qkv_pairs",
        ),
        _linear("attn_output", "attention.wo", "hidden", "q"),
        _linear("ffn_gate", "feed_forward.w1", "ff", "hidden"),
        _linear("ffn_down", "feed_forward.w2", "hidden", "ff"),
        _linear("ffn_up", "feed_forward.w3", "ff", "hidden"),
    ),
)
