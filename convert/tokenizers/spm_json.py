"""SentencePiece-style BPE that came as ``tokenizer.json`` only: scores from the merge ranks.

llama.cpp merges the pair whose result has the highest score, Hugging Face the pair of the lowest
rank. A result scored with minus its best rank is merged in the same order, which is also how
SentencePiece scores its own BPE pieces, so the result tokenizes as the lost ``tokenizer.model``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .bpe import bpe_tokens
from .hf_json import BpeTokenizer
from .special import token_text
from .spm import ADDED_SCORE, UNUSED_SCORE, Pieces
from .vocabulary import TokenType

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def is_spm_json(tokenizer: BpeTokenizer) -> bool:
    """Return whether a ``tokenizer.json`` holds a SentencePiece model (byte fallback, ``▁``)."""
    decoder = tokenizer.document.get("decoder") or {}
    return bool(tokenizer.model.get("byte_fallback")) and decoder.get("type") == "Sequence"


def spm_pieces(tokenizer: BpeTokenizer, vocab_size: int | None) -> Pieces:
    """Return tokens, float32 scores and types.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """
    tokens, types = bpe_tokens(tokenizer, vocab_size)
    scores = np.full(len(tokens), 0.0, np.float32)
    ranks = {"".join(merge.split(" ")): rank for rank, merge in _reversed(tokenizer)}
    unknown = token_text(tokenizer.model.get("unk_token"))
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == TokenType.UNUSED:
            scores[index] = UNUSED_SCORE
        elif _BYTE.fullmatch(token):
            types[index] = int(TokenType.BYTE)
        elif token == unknown:
            types[index] = int(TokenType.UNKNOWN)
        elif index in tokenizer.added:
            scores[index] = ADDED_SCORE if token not in tokenizer.vocab else 0.0
        else:
            # single characters come after all merges, in the order of their ids
            scores[index] = -float(ranks.get(token, len(ranks) + index))
    return tokens, scores, types


def unranked_pieces(
    tokenizer: BpeTokenizer, vocab_size: int | None, settings: Mapping[str, Any]
) -> Pieces:
    """Return tokens, scores and types for a vocabulary that goes along with its merges.

    Scores say nothing then. Control tokens are those that ``tokenizer_config.json`` names.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """
    tokens, types = bpe_tokens(tokenizer, vocab_size)
    named = {token_text(v) for k, v in settings.items() if k.endswith("_token")}
    more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    named |= {token_text(v) for v in (more.values() if isinstance(more, Mapping) else more)}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if _BYTE.fullmatch(token):
            types[index] = int(TokenType.BYTE)
        elif token in named:
            types[index] = int(TokenType.CONTROL)
        elif token in tokenizer.vocab and kind != TokenType.UNUSED:
            types[index] = int(TokenType.NORMAL)
        elif kind == TokenType.CONTROL:
            types[index] = int(TokenType.USER_DEFINED)
    return tokens, np.full(len(tokens), ADDED_SCORE, np.float32), types


def _reversed(tokenizer: BpeTokenizer) -> list[tuple[int, str]]:
    """Return (rank, merge) from the last to the first, so that the best rank is kept."""
    return list(enumerate(tokenizer.merges))[::-1]
