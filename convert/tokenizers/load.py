"""Choose how a tokenizer folder is read, and read it.

An architecture says which kinds its tokenizers may have; the first whose files are there wins, as
in llama.cpp's converter. Tried in this order: ``tekken`` (``tekken.json`` alone), ``unigram``
(SentencePiece or ``tokenizer.json``), ``spm`` (``tokenizer.model``), ``spm_json`` (a SentencePiece
model inside ``tokenizer.json``), ``gemma4`` (the same, with its merges), ``bpe`` (byte-level BPE),
``wordpiece``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError, UnsupportedError
from .bpe import bpe_tokens
from .chat_template import load_chat_template
from .files import TokenizerFiles
from .hf_json import BpeTokenizer, load_bpe
from .pre import find_pre
from .special import load_specials
from .spm import Pieces, load_spm
from .spm_json import is_spm_json, spm_pieces, unranked_pieces
from .tekken import FILE as TEKKEN
from .tekken import load_tekken
from .unigram import FAIRSEQ, MODELS, Unigram, load_unigram
from .vocabulary import Vocabulary
from .wordpiece import wordpiece_name, wordpiece_tokens

_FILES = {
    "tekken": (TEKKEN,),
    "unigram": (*MODELS, FAIRSEQ, "tokenizer.json"),
    "spm": ("tokenizer.model",),
    "spm_json": ("tokenizer.json",),
    "gemma4": ("tokenizer.json",),
    "bpe": ("tokenizer.json", "vocab.json"),
    "wordpiece": ("tokenizer.json", "vocab.txt"),
}
_TITLES = {
    "tekken": "tekken",
    "unigram": "Unigram",
    "spm": "SentencePiece",
    "spm_json": "SentencePiece",
    "gemma4": "SentencePiece",
    "bpe": "BPE",
    "wordpiece": "WordPiece",
}


@dataclass(frozen=True, slots=True)
class TokenizerRule:
    """How an architecture's tokenizers are read.

    Attributes:
        kinds: kinds to try, in order.
        space_prefix: write ``add_space_prefix`` when ``tokenizer_config.json`` has
            ``add_prefix_space``.
        token_types: write how many token types ("segments") the model has.
        plain_added: tokens added to a SentencePiece model keep their text as it is, and those of
            ``tokenizer.json`` count too.
    """

    kinds: tuple[str, ...] = ("bpe",)
    space_prefix: bool = False
    token_types: bool = False
    plain_added: bool = False


def load_vocabulary(
    files: TokenizerFiles,
    rule: TokenizerRule,
    config: Mapping[str, Any] | None = None,
    *,
    vocab_size: int | None = None,
    pre: str | None = None,
) -> Vocabulary:
    """Read the tokenizer of a folder.

    Args:
        files: the folder.
        rule: the kinds of tokenizer the architecture may have.
        config: the model's ``config.json``, for special token ids.
        vocab_size: number of tokens of the model; ids without a token are padded.
        pre: name of the pre-tokenizer, instead of the recognized one (BPE and WordPiece).

    Raises:
        ConfigError: no usable vocabulary, an unknown pre-tokenizer, or more tokens than the model.
        FormatError: a vocabulary file is damaged.
        UnsupportedError: a kind of tokenizer that is not read.
    """
    source = _Source(files, config, vocab_size, pre)
    vocabulary = _first_kind(source, rule)
    if rule.token_types:
        count = (config or {}).get("type_vocab_size", 1)
        vocabulary = replace(vocabulary, token_types=int(count))
    prefix = source.settings.get("add_prefix_space")
    if not rule.space_prefix or not isinstance(prefix, bool) or vocabulary.native:
        return vocabulary
    return replace(vocabulary, add_space_prefix=prefix)


@dataclass(frozen=True, slots=True)
class _Source:
    """What a vocabulary is read from."""

    files: TokenizerFiles
    config: Mapping[str, Any] | None
    vocab_size: int | None
    pre: str | None

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.files.json("tokenizer_config.json") or {}


def _first_kind(source: _Source, rule: TokenizerRule) -> Vocabulary:
    """Read the first kind of the rule whose files are there."""
    files = source.files
    has_json = files.path("tokenizer.json") is not None
    if "tekken" in rule.kinds and not has_json and files.path(TEKKEN) is not None:
        return load_tekken(files, source.vocab_size)
    if "unigram" in rule.kinds:
        unigram = load_unigram(files, source.vocab_size)
        if unigram is not None:
            return _unigram(source, unigram)
    if "spm" in rule.kinds and files.path("tokenizer.model") is not None:
        return _spm(source, load_spm(files, source.vocab_size, plain=rule.plain_added))
    return _from_json(source, rule)


def _from_json(source: _Source, rule: TokenizerRule) -> Vocabulary:
    files = source.files
    document = files.json("tokenizer.json")
    if document is None and "wordpiece" in rule.kinds and files.path("vocab.txt") is not None:
        return _wordpiece(source)
    if document is None and files.path("vocab.json") is None:
        raise UnsupportedError(
            f"{files.folder}: has none of {', '.join(_readable(rule))}; other tokenizer files are "
            "not read, convert it with transformers first"
        )
    kind = ((document or {}).get("model") or {}).get("type", "BPE")
    if kind == "WordPiece" and "wordpiece" in rule.kinds:
        return _wordpiece(source)
    if kind != "BPE":
        raise UnsupportedError(
            f"{files.folder / 'tokenizer.json'}: a {kind} tokenizer, this architecture's are "
            f"{' or '.join(_TITLES[k] for k in rule.kinds)}"
        )
    tokenizer = load_bpe(files)
    if "spm_json" in rule.kinds and is_spm_json(tokenizer):
        return _spm(source, spm_pieces(tokenizer, source.vocab_size))
    if "gemma4" in rule.kinds and is_spm_json(tokenizer):
        return _gemma4(source, tokenizer)
    if "bpe" not in rule.kinds:
        raise ConfigError(f"{files.folder}: this architecture needs {', '.join(_readable(rule))}")
    return _bpe(source, tokenizer)


def _readable(rule: TokenizerRule) -> list[str]:
    return list(dict.fromkeys(name for kind in rule.kinds for name in _FILES[kind]))


def _spm(source: _Source, pieces: Pieces) -> Vocabulary:
    tokens, scores, types = pieces
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        specials=load_specials(source.files, source.config, len(tokens)),
        chat_template=load_chat_template(source.files),
    )


def _gemma4(source: _Source, tokenizer: BpeTokenizer) -> Vocabulary:
    tokens, scores, types = unranked_pieces(tokenizer, source.vocab_size, source.settings)
    return Vocabulary(
        model="gemma4",
        pre="gemma4",
        tokens=tokens,
        types=types,
        scores=scores,
        merges=tokenizer.merges,
        specials=load_specials(source.files, source.config),
        chat_template=load_chat_template(source.files),
    )


def _unigram(source: _Source, unigram: Unigram) -> Vocabulary:
    tokens, scores, types = unigram.pieces
    return Vocabulary(
        model="t5",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        specials=load_specials(source.files, source.config, len(tokens)),
        chat_template=load_chat_template(source.files),
        add_space_prefix=unigram.settings.add_prefix,
        remove_spaces=unigram.settings.remove_spaces,
        charsmap=unigram.settings.charsmap,
    )


def _wordpiece(source: _Source) -> Vocabulary:
    tokenizer = load_bpe(source.files, "WordPiece")
    tokens, types = wordpiece_tokens(tokenizer, source.vocab_size)
    specials = load_specials(source.files, source.config, len(tokens))
    if not tokenizer.document and source.settings.get("do_lower_case") is False:
        specials = replace(specials, lowercase=False)
    return Vocabulary(
        model="bert",
        pre=source.pre or wordpiece_name(tokenizer),
        tokens=tokens,
        types=types,
        specials=specials,
        chat_template=load_chat_template(source.files),
    )


def _bpe(source: _Source, tokenizer: BpeTokenizer) -> Vocabulary:
    name = find_pre(tokenizer, source.pre)
    tokens, types = bpe_tokens(tokenizer, source.vocab_size)
    return Vocabulary(
        model="gpt2",
        pre=name,
        tokens=tokens,
        types=types,
        merges=tokenizer.merges,
        specials=load_specials(source.files, source.config),
        chat_template=load_chat_template(source.files),
    )
