"""The special tokens of GLM models, known by their text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ...errors import ConfigError
from ..tokenizers import Vocabulary
from ._record import Config

_END, _USER = "<|endoftext|>", "<|user|>"
#: GLM-4.5 and later.
_SPECIALS = {"bos": "[gMASK]", "eot": _USER, "unk": _END, "eom": "<|observation|>"}


def special_tokens(texts: Mapping[str, str]) -> Callable[[Vocabulary, Config], Vocabulary]:
    """Return what sets special tokens by role to those of the given texts, where none is set.

    Raises:
        ConfigError: the vocabulary has none of that text.
    """

    def adjust(vocabulary: Vocabulary, config: Config) -> Vocabulary:
        tokens = list(vocabulary.tokens)
        try:
            ids = {role: tokens.index(text) for role, text in texts.items()}
        except ValueError as error:
            raise ConfigError(f"the tokenizer is not one of GLM-4's: {error}") from None
        specials = vocabulary.specials
        new = {role: n for role, n in ids.items() if role not in specials.ids}
        return replace(vocabulary, specials=replace(specials, ids={**specials.ids, **new}))

    return adjust


adjust_vocabulary = special_tokens(_SPECIALS)
