"""A byte-level BPE vocabulary of GGUF back into ``tokenizer.json``.

Format: the serialization of Hugging Face ``tokenizers``. Ids come back as they were: an added token
whose id does not follow from its place is listed in the model's vocabulary too, as originals do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from .bpe import byte_level_text
from .hf_json import AddedToken, BpeTokenizer
from .pre import find_pre
from .pre_restore import normalizer_of, pre_tokenizer_of
from .restore_parts import (
    added_token,
    is_padding,
    json_bytes,
    said_roles,
    settings_of,
    template_of,
)
from .vocabulary import TokenType, Vocabulary

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": False,
    "use_regex": True,
}
#: Pre-tokenizers of tokenizers that take whole words from the vocabulary before merging.
_IGNORE_MERGES = frozenset({"llama-bpe", "glm4"})


def bpe_files(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json``, which takes in ``settings``.

    Raises:
        UnsupportedError: a pre-tokenizer whose regexes are not known.
        FormatError: tokens that are not text.
    """
    texts = [str(text) for text in vocabulary.tokens]
    added = _added(vocabulary, texts)
    add, said = vocabulary.specials.add, said_roles(vocabulary)
    # byte-level post-processors say no for both; nothing says yes for a token that has no id
    both = {"bos", "eos"} <= set(add) and all(r in said or not add[r] for r in ("bos", "eos"))
    template = template_of(vocabulary, texts)
    steps = [step for step in (_BYTE_LEVEL if both else None, template) if step is not None]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_of(vocabulary.pre),
        "post_processor": _sequence(steps),
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": _vocab(vocabulary, texts, [token["id"] for token in added]),
            "merges": list(vocabulary.merges),
        },
    }
    implied = said | ({"bos", "eos"} if both else set())
    control = {token["id"] for token in added if token["special"]}
    full = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings_of(vocabulary, texts, control, implied),
        **settings,
    }
    _set_switches(vocabulary.pre, document, full)
    return {"tokenizer.json": json_bytes(document), "tokenizer_config.json": json_bytes(full)}


def _sequence(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", "processors": steps}


def _added(vocabulary: Vocabulary, texts: list[str]) -> list[dict[str, Any]]:
    return [
        added_token(
            n,
            texts[n],
            special=kind == TokenType.CONTROL,
            normalized=byte_level_text(texts[n]) != texts[n],
        )
        for n, kind in enumerate(vocabulary.types)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]


def _vocab(vocabulary: Vocabulary, texts: list[str], added: list[int]) -> dict[str, int]:
    """Return the model's own vocabulary, with the added tokens that need it to keep their ids."""
    known = set(added)
    plain = [n for n in range(len(texts)) if n not in known and not is_padding(vocabulary, n)]
    last = plain[-1] if plain else -1
    after = [n for n in added if n > last]
    if after != list(range(last + 1, last + 1 + len(after))):
        last = len(texts)
    return {texts[n]: n for n in sorted({*plain, *(n for n in added if n < last)})}


def _set_switches(name: str, document: dict[str, Any], settings: dict[str, Any]) -> None:
    """Set the switches that tell a pre-tokenizer from others of the same structure."""
    usual, ignores = normalizer_of(name), name in _IGNORE_MERGES
    for normalizer in dict.fromkeys((usual, None, "NFC")):
        for ignore in (ignores, not ignores):
            for clean_up in (False, True):
                _switch(document, settings, normalizer, ignore, clean_up)
                if _found(document, settings) == name:
                    return
    _switch(document, settings, usual, ignores, clean_up=False)


def _switch(
    document: dict[str, Any],
    settings: dict[str, Any],
    normalizer: str | None,
    ignore_merges: bool,
    clean_up: bool,
) -> None:
    document["normalizer"] = {"type": normalizer} if normalizer else None
    document["model"]["ignore_merges"] = ignore_merges
    settings["clean_up_tokenization_spaces"] = clean_up


def _found(document: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    added = {
        t["id"]: AddedToken(t["id"], t["content"], t["special"], t["normalized"])
        for t in document["added_tokens"]
    }
    vocab = document["model"]["vocab"]
    try:
        return find_pre(BpeTokenizer("", vocab, (), added, document, settings))
    except ConfigError:
        return ""
