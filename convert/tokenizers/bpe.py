"""Byte-level BPE vocabularies: tokens and types per id, as llama.cpp's ``gpt2`` model wants them.

Added tokens are matched by llama.cpp against raw text, so those that Hugging Face does not
normalize are stored as they decode. Ids without a token become ``[PADn]`` of type unused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from ...errors import ConfigError
from .hf_json import AddedToken, BpeTokenizer
from .spm import looks_special
from .vocabulary import TokenType


def bpe_tokens(tokenizer: BpeTokenizer, vocab_size: int | None) -> tuple[list[str], list[int]]:
    """Return the text and type of every id.

    Args:
        tokenizer: the tokenizer.
        vocab_size: number of tokens the model has (rows of the embedding); None: as many as the
            tokenizer.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """
    return placed_tokens(tokenizer, vocab_size, _decoder(tokenizer))


def placed_tokens(
    tokenizer: BpeTokenizer, vocab_size: int | None, decode: Callable[[str], str]
) -> tuple[list[str], list[int]]:
    """Return the text and type of every id; ``decode`` turns an added token into what it prints."""
    size = vocab_size or tokenizer.size
    if tokenizer.size > size:
        raise ConfigError(
            f"{tokenizer.path}: the tokenizer has ids up to {tokenizer.size - 1}, the model has "
            f"{size} tokens (vocab_size); this tokenizer belongs to another model, or the "
            "embedding was not resized after tokens were added: --vocab-fix trim drops those "
            "tokens, --vocab-fix pad gives them rows of zeros"
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, index in tokenizer.vocab.items():
        if not 0 <= index < size:
            raise ConfigError(f"{tokenizer.path}: token {text!r} has the id {index}")
        tokens[index], types[index] = text, int(TokenType.NORMAL)
    for index, token in tokenizer.added.items():
        tokens[index], types[index] = _added(token, decode)
    return tokens, types


def _added(token: AddedToken, decode: Callable[[str], str]) -> tuple[str, int]:
    text = token.content if token.normalized else decode(token.content)
    if token.special or looks_special(text):
        return text, int(TokenType.CONTROL)
    return text.replace("\u2581", " "), int(TokenType.USER_DEFINED)


def _decoder(tokenizer: BpeTokenizer) -> Callable[[str], str]:
    """Return what the tokenizer's decoder makes of an added token's text."""
    decoder = tokenizer.document.get("decoder") or {"type": "ByteLevel"}
    if decoder.get("type") == "ByteLevel":
        return byte_level_text
    from tokenizers import Tokenizer

    try:
        library = Tokenizer.from_file(tokenizer.path)
    except Exception as error:  # the library raises nothing more exact
        raise ConfigError(f"{tokenizer.path}: tokenizers cannot load it ({error})") from error

    def decode(text: str) -> str:
        ids = library.encode(text, add_special_tokens=False).ids
        return str(library.decode(ids, skip_special_tokens=False))

    return decode


def byte_level_text(text: str) -> str:
    """Return what byte-level letters stand for; a text with other letters as it is."""
    letters = byte_letters()
    if all(c in letters for c in text):
        return bytes(letters[c] for c in text).decode("utf-8", "replace")
    return text


@cache
def byte_letters() -> Mapping[str, int]:
    """Return GPT-2's printable letter of each byte, as a map from letter to byte.

    Bytes that print as themselves keep their letter; the 68 others take the letters from U+0100.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
