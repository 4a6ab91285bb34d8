"""SentencePiece vocabularies: ``tokenizer.model`` plus the tokens added around it.

Sources: the ``sentencepiece`` library for the model file; ``added_tokens.json`` and the
``added_tokens_decoder`` of ``tokenizer_config.json`` for what was added later. Types and scores
follow llama.cpp's converter.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, FormatError
from .files import TokenizerFiles
from .vocabulary import TokenType

logger = logging.getLogger(__name__)

ADDED_SCORE = -1000.0
UNUSED_SCORE = -10000.0

#: Tokens that some models forgot to mark as special.
_CONTROL_TEXTS = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_CONTROL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))

Pieces = tuple[list[str], np.ndarray, list[int]]


def looks_special(text: str) -> bool:
    """Return whether a token is a control token by its looks, such as ``<|end|>``."""
    return text in _CONTROL_TEXTS or any(
        text.startswith(left) and text.endswith(right) for left, right in _CONTROL_ENDS
    )


def load_spm(files: TokenizerFiles, vocab_size: int | None, *, plain: bool = False) -> Pieces:
    """Return tokens, float32 scores and types of a SentencePiece tokenizer.

    Args:
        files: the tokenizer's folder, with a ``tokenizer.model``.
        vocab_size: length to pad or cut to (rows of the embedding); None: the model's own.
        plain: added tokens keep their text and are special only where they say so; those of
            ``tokenizer.json`` count too.

    Raises:
        FormatError: ``tokenizer.model`` is not a SentencePiece model.
        ConfigError: an added token has a bad id.
    """
    path = files.path("tokenizer.model")
    assert path is not None
    tokens, scores, types = read_pieces(path)
    size = vocab_size or len(tokens)
    if len(tokens) > size:
        logger.warning("%s: ids from %d on are beyond the vocabulary, dropped", path, size)
        tokens, scores, types = tokens[:size], scores[:size], types[:size]
    padding = range(len(tokens), size)
    tokens += [f"[PAD{i}]" for i in padding]
    types += [TokenType.UNUSED] * len(padding)
    scores = np.concatenate([scores, np.full(len(padding), UNUSED_SCORE, np.float32)])
    for index, text, kind in _added(files, plain=plain):
        if not 0 <= index < size:
            logger.warning("added token %r has id %d beyond the vocabulary, dropped", text, index)
            continue
        tokens[index], scores[index], types[index] = text, ADDED_SCORE, kind
    return tokens, scores, types


def read_pieces(path: Path) -> Pieces:
    """Return what a SentencePiece model holds, in the types that llama.cpp's converter sees.

    Raises:
        FormatError: the file is not such a model.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromFile(str(path))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: is not a SentencePiece model: {error}") from error
    ids = range(model.vocab_size())
    types = [TokenType.NORMAL] * len(ids)
    # the first question that says yes decides, in this order
    for ask, kind in (
        (model.IsByte, TokenType.BYTE),
        (model.IsUnused, TokenType.UNUSED),
        (model.IsControl, TokenType.CONTROL),
        (model.IsUnknown, TokenType.UNKNOWN),
    ):
        for index in ids:
            if ask(index):
                types[index] = kind
    scores = np.array([model.GetScore(i) for i in ids], np.float32)
    try:
        pieces = [model.IdToPiece(i) for i in ids]
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: holds a piece that is not UTF-8: {error}") from error
    return pieces, scores, [int(kind) for kind in types]


def _added(files: TokenizerFiles, *, plain: bool) -> list[tuple[int, str, int]]:
    """Return (id, text, type) of added tokens; the later entry of an id wins."""
    found: list[tuple[int, str, int]] = []
    for text, index in (files.json("added_tokens.json") or {}).items():
        found.append((_id(files, index), text, int(TokenType.USER_DEFINED)))
    settings: Mapping[str, Any] = files.json("tokenizer_config.json") or {}
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, Mapping):
        raise ConfigError(f"{files.folder}: added_tokens_decoder is no JSON object")
    tokens = list(added.items())
    if plain:
        document: Mapping[str, Any] = files.json("tokenizer.json") or {}
        tokens += [(token.get("id"), token) for token in document.get("added_tokens") or ()]
    for index, token in tokens:
        content = token.get("content") if isinstance(token, Mapping) else None
        if not isinstance(content, str):
            raise ConfigError(f"{files.folder}: the added token {index} has no content")
        if token.get("special") or (not plain and looks_special(content)):
            found.append((_id(files, index), content, int(TokenType.CONTROL)))
        else:
            # user-defined tokens are matched against text in which spaces are still spaces
            text = content if plain else content.replace("\u2581", " ")
            found.append((_id(files, index), text, int(TokenType.USER_DEFINED)))
    return found


def _id(files: TokenizerFiles, value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ConfigError(f"{files.folder}: an added token has the id {value!r}") from None
