"""WordPiece vocabularies (BERT), as llama.cpp's ``bert`` model wants them.

BERT marks what continues a word (``##ing``); llama.cpp marks what begins one, with the letter that
SentencePiece writes for a space. Sources: ``tokenizer.json`` or ``vocab.txt``.
"""

from __future__ import annotations

from .bpe import placed_tokens
from .hf_json import BpeTokenizer
from .vocabulary import TokenType

_CONTINUES = "##"
_BEGINS = "\u2581"
#: llama.cpp treats all WordPiece vocabularies alike; the names of the two that its converter knows.
_NAME, _CHINESE_NAME, _CHINESE_SIZE = "jina-v2-en", "bert-bge-large", 21128


def wordpiece_tokens(
    tokenizer: BpeTokenizer, vocab_size: int | None
) -> tuple[list[str], list[int]]:
    """Return the text and type of every id.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """
    tokens, types = placed_tokens(tokenizer, vocab_size, lambda text: text)
    return [_marked(text, kind) for text, kind in zip(tokens, types, strict=True)], types


def wordpiece_name(tokenizer: BpeTokenizer) -> str:
    """Return ``tokenizer.ggml.pre``."""
    return _CHINESE_NAME if tokenizer.size == _CHINESE_SIZE else _NAME


def _marked(text: str, kind: int) -> str:
    if kind == TokenType.CONTROL:
        return text
    return text[len(_CONTINUES) :] if text.startswith(_CONTINUES) else _BEGINS + text
