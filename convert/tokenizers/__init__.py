"""Tokenizers: Hugging Face and SentencePiece files to the vocabulary that GGUF stores."""

from __future__ import annotations

from .files import TokenizerFiles, find_tokenizer
from .load import TokenizerRule, load_vocabulary
from .vocabulary import Specials, TokenType, Vocabulary, vocabulary_entries

__all__ = [
    "Specials",
    "TokenType",
    "TokenizerFiles",
    "TokenizerRule",
    "Vocabulary",
    "find_tokenizer",
    "load_vocabulary",
    "vocabulary_entries",
]
