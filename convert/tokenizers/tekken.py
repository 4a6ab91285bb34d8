"""Mistral's ``tekken.json``: byte-level BPE as ranked byte strings, with special tokens in front.

Format: ``config`` (sizes, version), ``vocab`` (``rank``, ``token_bytes`` in base64) and, in newer
files, ``special_tokens``. Merges are derived from the ranks. Keys and their order are those that
llama.cpp's converter writes for such tokenizers.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ...errors import ConfigError
from .bpe import byte_letters
from .chat_template import ChatTemplate, load_chat_template
from .files import TokenizerFiles
from .vocabulary import Specials, TokenType, Vocabulary

FILE = "tekken.json"
#: Special tokens of files that do not list theirs.
_OLD_SPECIALS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)  # fmt: skip
_ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
#: Tokenizer versions whose chat format llama.cpp has built in.
_BUILT_IN = {"v3": "mistral-v3-tekken", "v7": "mistral-v7-tekken"}


def load_tekken(files: TokenizerFiles, vocab_size: int | None) -> Vocabulary:
    """Read the ``tekken.json`` of a folder.

    Raises:
        ConfigError: it is malformed, or has not as many tokens as the model.
    """
    path, document = files.folder / FILE, files.json(FILE) or {}
    try:
        config = document["config"]
        size, n_special = (
            int(config["default_vocab_size"]),
            int(config["default_num_special_tokens"]),
        )
        ranked = [base64.b64decode(e["token_bytes"], validate=True) for e in document["vocab"]]
        ranked = ranked[: size - n_special]
        special = _specials(document.get("special_tokens"), n_special)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ConfigError(f"{path}: is not a tekken tokenizer: {error!r}") from error
    if len(ranked) != size - n_special or [len(b) for b in ranked[:256]] != [1] * 256:
        raise ConfigError(
            f"{path}: {len(ranked)} ranked tokens with all bytes first are needed to make "
            f"{size - n_special}; the file is incomplete"
        )
    if vocab_size is not None and size != vocab_size:
        raise ConfigError(
            f"{path}: {size} tokens, the model has {vocab_size} (vocab_size): this tokenizer "
            "belongs to another model, or use --vocab-fix"
        )
    kinds = [int(TokenType.CONTROL)] * n_special + [int(TokenType.NORMAL)] * len(ranked)
    ids = {role: special.index(text) for role, text in _ROLES.items() if text in special}
    ids.setdefault("pad", ids.get("eos", 0))
    return Vocabulary(
        model="gpt2",
        pre="tekken",
        tokens=[*special, *(letters(b) for b in ranked)],
        types=kinds,
        merges=_merges(str(path), ranked),
        specials=Specials(ids, {"bos": True, "eos": False}),
        chat_template=_template(files, str(config.get("version", ""))),
        native=True,
    )


def _specials(listed: Sequence[Mapping[str, Any]] | None, count: int) -> list[str]:
    """Return the text of every special id; those without one get a name by their number."""
    if listed is None:
        named = dict(enumerate(_OLD_SPECIALS))
    else:
        named = {int(t["rank"]): str(t["token_str"]) for t in listed}
    return [named.get(n, f"<SPECIAL_{n}>") for n in range(count)]


def _merges(path: str, ranked: Sequence[bytes]) -> list[str]:
    """Return all pairs that make each token, by its rank, then by those of the parts."""
    ranks = {piece: rank for rank, piece in enumerate(ranked)}
    merges: list[str] = []
    for piece in ranked[256:]:
        cuts = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        pairs = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
        if not pairs:
            raise ConfigError(f"{path}: the token {piece!r} cannot be merged from two others")
        merges += [f"{letters(a)} {letters(b)}" for _, _, a, b in sorted(pairs)]
    return merges


def letters(piece: bytes) -> str:
    """Return bytes as the letters that byte-level BPE writes for them."""
    return piece.decode("latin-1").translate(_letter_table())


@cache
def _letter_table() -> dict[int, str]:
    return {byte: letter for letter, byte in byte_letters().items()}


def _template(files: TokenizerFiles, version: str) -> ChatTemplate:
    return load_chat_template(files) or _BUILT_IN.get(version)
