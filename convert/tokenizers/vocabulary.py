"""A vocabulary as GGUF stores it, and its metadata entries.

Format: the ``tokenizer.*`` keys of GGUF as llama.cpp reads them; the order of the entries is the
one its own converter writes. Token types: 1 normal, 2 unknown, 3 control, 4 user-defined,
5 unused, 6 byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from ..gguf.values import (
    KeyValue,
    ValueType,
    boolean,
    f32_array,
    i32_array,
    string,
    strings,
    u32,
)
from .chat_template import ChatTemplate, template_entries


class TokenType(IntEnum):
    """What a token is to llama.cpp."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


#: Role of a special token to its GGUF key ("seperator" is spelled so in the format).
ID_KEYS: Mapping[str, str] = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
}
ADD_KEYS: Mapping[str, str] = {
    "bos": "tokenizer.ggml.add_bos_token",
    "eos": "tokenizer.ggml.add_eos_token",
    "sep": "tokenizer.ggml.add_sep_token",
}


@dataclass(frozen=True, slots=True)
class Specials:
    """Special token ids, whether they are added to a prompt, and normalizer flags, by role."""

    ids: Mapping[str, int] = field(default_factory=dict)
    add: Mapping[str, bool] = field(default_factory=dict)
    lowercase: bool | None = None
    strip_accents: bool | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Everything GGUF holds of a tokenizer.

    Attributes:
        model: ``llama`` (SentencePiece BPE), ``gpt2`` (byte-level BPE), ``bert`` (WordPiece) or
            ``t5`` (Unigram).
        pre: name of the pre-tokenizer.
        tokens: one per id, as text or UTF-8 bytes.
        types: ``TokenType`` per id.
        scores: per id, for SentencePiece and Unigram.
        merges: ``"left right"`` pairs by rank, for BPE.
        specials: special token ids and whether they are added.
        chat_template: one template, or several by name.
        add_space_prefix: written only when known.
        charsmap: compiled normalization rules, for Unigram.
        remove_spaces: runs of spaces become one, for Unigram.
        token_types: number of token types ("segments"), for encoders.
        native: it comes from Mistral's own file, whose entries have another order.
        extra: more entries, at the end or in place of one of the same key.
    """

    model: str
    pre: str
    tokens: Sequence[str] | Sequence[bytes]
    types: Sequence[int]
    scores: np.ndarray | None = None
    merges: Sequence[str] = ()
    specials: Specials = field(default_factory=Specials)
    chat_template: ChatTemplate = None
    add_space_prefix: bool | None = None
    charsmap: bytes = b""
    remove_spaces: bool | None = None
    token_types: int | None = None
    native: bool = False
    extra: Sequence[KeyValue] = ()


def vocabulary_entries(vocabulary: Vocabulary) -> list[KeyValue]:
    """Return the metadata entries of a vocabulary, in the order of llama.cpp's converter."""
    v, words = vocabulary, _words(vocabulary)
    entries = [string("tokenizer.ggml.model", v.model), string("tokenizer.ggml.pre", v.pre)]
    merges = [strings("tokenizer.ggml.merges", v.merges)] if v.merges else []
    ids = [u32(ID_KEYS[role], n) for role, n in v.specials.ids.items() if role in ID_KEYS]
    if v.native:
        entries += [*merges, *ids, *words]
    else:
        entries = [*_first(v), *entries, *words, *_spaces(v), *merges, *ids]
    entries += [boolean(ADD_KEYS[r], on) for r, on in v.specials.add.items() if r in ADD_KEYS]
    entries += template_entries(v.chat_template)
    if v.specials.lowercase is not None:
        entries.append(boolean("tokenizer.ggml.normalizer.lowercase", v.specials.lowercase))
    if v.specials.strip_accents is not None:
        entries.append(boolean("tokenizer.ggml.normalizer.strip_accents", v.specials.strip_accents))
    if v.model == "gpt2":
        entries += _token_types(v)
    return list({entry.key: entry for entry in (*entries, *v.extra)}.values())


def _words(v: Vocabulary) -> list[KeyValue]:
    entries = [strings("tokenizer.ggml.tokens", v.tokens)]
    if v.native:  # the reference stores these zeros as integers
        entries.append(i32_array("tokenizer.ggml.scores", np.zeros(len(v.tokens))))
    elif v.scores is not None:
        entries.append(f32_array("tokenizer.ggml.scores", v.scores))
    return [*entries, i32_array("tokenizer.ggml.token_type", v.types)]


def _first(v: Vocabulary) -> list[KeyValue]:
    """Entries before all others."""
    if v.model == "bert":
        return _token_types(v)
    return _space_prefix(v) if v.model != "t5" else []


def _spaces(v: Vocabulary) -> list[KeyValue]:
    """What Unigram models say of spaces and normalization."""
    if v.model != "t5":
        return []
    entries = [*_space_prefix(v), *_token_types(v)]
    if v.remove_spaces is not None:
        entries.append(boolean("tokenizer.ggml.remove_extra_whitespaces", v.remove_spaces))
    if v.charsmap:
        codes = np.frombuffer(v.charsmap, np.uint8)
        key = "tokenizer.ggml.precompiled_charsmap"
        entries.append(KeyValue(key, ValueType.ARRAY, codes, ValueType.U8))
    return entries


def _space_prefix(v: Vocabulary) -> list[KeyValue]:
    if v.add_space_prefix is None:
        return []
    return [boolean("tokenizer.ggml.add_space_prefix", v.add_space_prefix)]


def _token_types(v: Vocabulary) -> list[KeyValue]:
    if v.token_types is None:
        return []
    return [u32("tokenizer.ggml.token_type_count", v.token_types)]
