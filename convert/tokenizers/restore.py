"""A GGUF vocabulary back into tokenizer files that transformers loads.

Byte-level BPE becomes ``tokenizer.json``, SentencePiece ``tokenizer.model`` as well; both come with
a ``tokenizer_config.json``. What is written gives the same vocabulary when it is converted again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import FormatError, UnsupportedError
from .restore_bpe import bpe_files
from .restore_spm import spm_files
from .vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class TokenizerFolder:
    """Files by name, and the token ids by role that ``config.json`` should have."""

    files: Mapping[str, bytes]
    ids: Mapping[str, int]


def restore_tokenizer(vocabulary: Vocabulary, *, max_length: int | None = None) -> TokenizerFolder:
    """Return the files of a tokenizer.

    Args:
        vocabulary: what a GGUF file holds.
        max_length: the model's context length.

    Raises:
        UnsupportedError: a kind of tokenizer, or a pre-tokenizer, that is not brought back.
        FormatError: tokens that are not text.
    """
    for index, text in enumerate(vocabulary.tokens):
        if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
            raise FormatError(f"the vocabulary's token {index} is not UTF-8 text")
    settings = _settings(vocabulary, max_length)
    if vocabulary.model == "llama":
        files = spm_files(vocabulary, settings)
    elif vocabulary.model == "gpt2":
        files = bpe_files(vocabulary, settings)
    else:
        raise UnsupportedError(
            f"a tokenizer of the kind {vocabulary.model!r} is not brought back yet; give the "
            "original tokenizer's folder with --tokenizer DIR"
        )
    return TokenizerFolder(files, dict(vocabulary.specials.ids))


def _settings(vocabulary: Vocabulary, max_length: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if max_length is not None:
        settings["model_max_length"] = max_length
    template = vocabulary.chat_template
    if isinstance(template, str):
        settings["chat_template"] = template
    elif template is not None:
        settings["chat_template"] = [{"name": n, "template": t} for n, t in template]
    return settings
