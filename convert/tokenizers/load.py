"""Choose how a tokenizer folder is read, and read it.

An architecture says in which order the kinds are tried (``spm``: ``tokenizer.model``; ``spm_json``:
a SentencePiece model inside ``tokenizer.json``; ``bpe``: byte-level BPE); the first whose files are
there wins, as in llama.cpp's converter.
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
from .spm_json import is_spm_json, spm_pieces
from .vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class TokenizerRule:
    """How an architecture's tokenizers are read.

    Attributes:
        kinds: kinds to try, in order.
        space_prefix: write ``add_space_prefix`` when ``tokenizer_config.json`` has
            ``add_prefix_space``.
        plain_added: tokens added to a SentencePiece model keep their text as it is, and those of
            ``tokenizer.json`` count too.
    """

    kinds: tuple[str, ...] = ("bpe",)
    space_prefix: bool = False
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
        pre: name of the pre-tokenizer, instead of the recognized one (BPE only).

    Raises:
        ConfigError: no usable vocabulary, an unknown pre-tokenizer, or more tokens than the model.
        FormatError: a vocabulary file is damaged.
        UnsupportedError: a kind of tokenizer that is not read.
    """
    if "spm" in rule.kinds and files.path("tokenizer.model") is not None:
        vocabulary = _spm(files, config, load_spm(files, vocab_size, plain=rule.plain_added))
    else:
        vocabulary = _from_json(files, rule, config, vocab_size, pre)
    prefix = (files.json("tokenizer_config.json") or {}).get("add_prefix_space")
    if not rule.space_prefix or not isinstance(prefix, bool):
        return vocabulary
    return replace(vocabulary, add_space_prefix=prefix)


def _from_json(
    files: TokenizerFiles,
    rule: TokenizerRule,
    config: Mapping[str, Any] | None,
    vocab_size: int | None,
    pre: str | None,
) -> Vocabulary:
    document = files.json("tokenizer.json")
    kind = ((document or {}).get("model") or {}).get("type", "BPE")
    if document is None and files.path("vocab.json") is None:
        raise UnsupportedError(
            f"{files.folder}: has neither tokenizer.json, tokenizer.model nor vocab.json; other "
            "tokenizer files are not read, convert it with transformers first"
        )
    if kind != "BPE":
        raise UnsupportedError(
            f"{files.folder / 'tokenizer.json'}: a {kind} tokenizer, this architecture's are BPE"
        )
    tokenizer = load_bpe(files)
    if "spm_json" in rule.kinds and is_spm_json(tokenizer):
        return _spm(files, config, spm_pieces(tokenizer, vocab_size))
    if "bpe" not in rule.kinds:
        raise ConfigError(f"{files.folder}: this architecture needs a tokenizer.model")
    return _bpe(files, config, tokenizer, vocab_size, pre)


def _spm(files: TokenizerFiles, config: Mapping[str, Any] | None, pieces: Pieces) -> Vocabulary:
    tokens, scores, types = pieces
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        specials=load_specials(files, config, len(tokens)),
        chat_template=load_chat_template(files),
    )


def _bpe(
    files: TokenizerFiles,
    config: Mapping[str, Any] | None,
    tokenizer: BpeTokenizer,
    vocab_size: int | None,
    pre: str | None,
) -> Vocabulary:
    name = find_pre(tokenizer, pre)
    tokens, types = bpe_tokens(tokenizer, vocab_size)
    return Vocabulary(
        model="gpt2",
        pre=name,
        tokens=tokens,
        types=types,
        merges=tokenizer.merges,
        specials=load_specials(files, config),
        chat_template=load_chat_template(files),
    )
