"""Unigram vocabularies (T5, XLM-RoBERTa), as llama.cpp's ``t5`` model wants them.

Sources: a SentencePiece model (``tokenizer.model``, ``spiece.model``; ``sentencepiece.bpe.model``,
whose ids fairseq moved by one), or the Unigram model of a ``tokenizer.json``. Scores, types and the
compiled normalization rules follow llama.cpp's converter.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError
from .files import TokenizerFiles
from .special import ROLES, flat, token_text
from .spm import ADDED_SCORE, UNUSED_SCORE, Pieces, read_pieces
from .spm_proto import UNIGRAM, SpmSettings, read_settings
from .vocabulary import TokenType

#: SentencePiece files that hold Unigram models, in order; the last one has fairseq's ids.
MODELS = ("tokenizer.model", "spiece.model")
FAIRSEQ = "sentencepiece.bpe.model"
_FAIRSEQ_HEAD = ("<s>", "<pad>", "</s>", "<unk>")
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Unigram:
    """Tokens, scores and types with the settings that go with them."""

    pieces: Pieces
    settings: SpmSettings


def load_unigram(files: TokenizerFiles, vocab_size: int | None) -> Unigram | None:
    """Read the Unigram tokenizer of a folder; None when there is none.

    Args:
        files: the folder.
        vocab_size: number of tokens of the model; ids without a token are padded.

    Raises:
        ConfigError: a malformed ``tokenizer.json``, or more tokens than the model has.
        FormatError: a damaged SentencePiece model.
    """
    fairseq = files.path(FAIRSEQ)
    if fairseq is not None:
        return _fairseq(fairseq, vocab_size)
    path = next((p for name in MODELS if (p := files.path(name)) is not None), None)
    if path is not None:
        settings = read_settings(path)
        return _model(files, path, settings, vocab_size) if settings.kind == UNIGRAM else None
    document = files.json("tokenizer.json") or {}
    model = document.get("model")
    if isinstance(model, Mapping) and model.get("type", _guess(model)) == "Unigram":
        return _document(files, document, model, vocab_size)
    return None


def _guess(model: Mapping[str, Any]) -> str:
    return "Unigram" if isinstance(model.get("vocab"), list) else "BPE"


def _model(
    files: TokenizerFiles, path: Path, settings: SpmSettings, vocab_size: int | None
) -> Unigram:
    tokens, scores, types = _padded(path, read_pieces(path), vocab_size)
    for text, index in (files.json("added_tokens.json") or {}).items():
        if isinstance(index, int) and 0 <= index < len(tokens):
            tokens[index], scores[index] = text, ADDED_SCORE
            types[index] = int(TokenType.USER_DEFINED)
    return Unigram((tokens, scores, types), settings)


def _fairseq(path: Path, vocab_size: int | None) -> Unigram:
    """Four special tokens first, the pieces from the third on, one id later; the last one goes."""
    tokens, scores, types = read_pieces(path)
    size = max(vocab_size or 0, len(tokens))
    tokens, scores, types = _padded(path, (tokens, scores, types), size)
    control = int(TokenType.CONTROL)
    return Unigram(
        (
            [*_FAIRSEQ_HEAD, *tokens[3:-1]],
            np.concatenate([np.zeros(4, np.float32), scores[3:-1]]),
            [control, control, control, int(TokenType.UNKNOWN), *types[3:-1]],
        ),
        read_settings(path),
    )


def _padded(path: Path, pieces: Pieces, vocab_size: int | None) -> Pieces:
    tokens, scores, types = pieces
    size = vocab_size or len(tokens)
    if len(tokens) > size:
        raise ConfigError(
            f"{path}: {len(tokens)} tokens, the model has {size}: this tokenizer belongs to "
            "another model, or use --vocab-fix"
        )
    rest = range(len(tokens), size)
    return (
        [*tokens, *(f"[PAD{i}]" for i in rest)],
        np.concatenate([scores, np.full(len(rest), UNUSED_SCORE, np.float32)]),
        [*types, *[int(TokenType.UNUSED)] * len(rest)],
    )


def _document(
    files: TokenizerFiles,
    document: Mapping[str, Any],
    model: Mapping[str, Any],
    vocab_size: int | None,
) -> Unigram:
    path = files.folder / "tokenizer.json"
    try:
        tokens = [str(text) for text, _ in model["vocab"]]
        scores = np.array([score for _, score in model["vocab"]], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: the Unigram vocabulary is no list of [text, score]") from error
    added = {
        t["id"]: t
        for t in document.get("added_tokens") or ()
        if isinstance(t, Mapping) and isinstance(t.get("id"), int) and token_text(t) is not None
    }
    settings = files.json("tokenizer_config.json") or {}
    named = {token_text(settings.get(f"{role}_token")) for role in ROLES}
    unknown = _unknown_id(model, settings, added)
    types = [
        _kind(
            text, n == unknown, n in added, text in named or bool(added.get(n, {}).get("special"))
        )
        for n, text in enumerate(tokens)
    ]
    last = max(added, default=-1) + 1
    tokens, scores, types = _padded(
        path, (tokens, scores, types), vocab_size or max(last, len(tokens))
    )
    for n, token in added.items():
        if types[n] == TokenType.UNUSED and n < len(tokens):
            tokens[n], scores[n] = str(token["content"]), ADDED_SCORE
            types[n] = int(TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED)
    return Unigram((tokens, scores, types), _document_settings(path, document, settings))


def _unknown_id(
    model: Mapping[str, Any], settings: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]
) -> object:
    text = token_text(settings.get("unk_token"))
    found = next((n for n, token in added.items() if token["content"] == text), None)
    return model.get("unk_id", _UNKNOWN) if found is None else found


def _kind(text: str, unknown: bool, added: bool, special: bool) -> int:
    if unknown:
        return int(TokenType.UNKNOWN)
    if special:
        return int(TokenType.CONTROL)
    if added:
        return int(TokenType.USER_DEFINED)
    return int(TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL)


def _document_settings(
    path: Path, document: Mapping[str, Any], settings: Mapping[str, Any]
) -> SpmSettings:
    """Read what a normalizer and a pre-tokenizer say in the terms of SentencePiece."""
    found = SpmSettings(
        add_prefix=bool(settings.get("add_prefix_space", True)),
        remove_spaces=bool(settings.get("clean_up_tokenization_spaces", False)),
    )
    for step in flat(document.get("normalizer"), "normalizers"):
        if step.get("type") == "Precompiled":
            try:
                charsmap = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
            except (binascii.Error, TypeError, ValueError) as error:
                raise ConfigError(f"{path}: precompiled_charsmap is not base64") from error
            found = replace(found, charsmap=charsmap)
        elif step.get("type") == "Replace" and "{2,}" in str(step.get("pattern")):
            found = replace(found, remove_spaces=True)
    for step in flat(document.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and (
            step.get("prepend_scheme") == "never" or step.get("add_prefix_space") is False
        ):
            found = replace(found, add_prefix=False)
    return found
