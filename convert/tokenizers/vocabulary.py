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

from ..gguf.values import KeyValue, boolean, f32_array, i32_array, string, strings, u32
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
        model: ``llama`` (SentencePiece) or ``gpt2`` (byte-level BPE).
        pre: name of the pre-tokenizer.
        tokens: one per id, as text or UTF-8 bytes.
        types: ``TokenType`` per id.
        scores: per id, for SentencePiece.
        merges: ``"left right"`` pairs by rank, for BPE.
        specials: special token ids and whether they are added.
        chat_template: one template, or several by name.
        add_space_prefix: written only when known.
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
    extra: Sequence[KeyValue] = ()


def vocabulary_entries(vocabulary: Vocabulary) -> list[KeyValue]:
    """Return the metadata entries of a vocabulary, in the order of llama.cpp's converter."""
    entries: list[KeyValue] = []
    if vocabulary.add_space_prefix is not None:
        entries.append(boolean("tokenizer.ggml.add_space_prefix", vocabulary.add_space_prefix))
    entries += [
        string("tokenizer.ggml.model", vocabulary.model),
        string("tokenizer.ggml.pre", vocabulary.pre),
        strings("tokenizer.ggml.tokens", vocabulary.tokens),
    ]
    if vocabulary.scores is not None:
        entries.append(f32_array("tokenizer.ggml.scores", vocabulary.scores))
    entries.append(i32_array("tokenizer.ggml.token_type", vocabulary.types))
    if vocabulary.merges:
        entries.append(strings("tokenizer.ggml.merges", vocabulary.merges))
    specials = vocabulary.specials
    entries += [u32(ID_KEYS[role], n) for role, n in specials.ids.items() if role in ID_KEYS]
    entries += [boolean(ADD_KEYS[r], on) for r, on in specials.add.items() if r in ADD_KEYS]
    entries += template_entries(vocabulary.chat_template)
    if specials.lowercase is not None:
        entries.append(boolean("tokenizer.ggml.normalizer.lowercase", specials.lowercase))
    if specials.strip_accents is not None:
        entries.append(boolean("tokenizer.ggml.normalizer.strip_accents", specials.strip_accents))
    return list({entry.key: entry for entry in (*entries, *vocabulary.extra)}.values())
