"""A SentencePiece vocabulary of GGUF back into ``tokenizer.model`` and ``tokenizer.json``.

The model file keeps scores and types; ``tokenizer.json`` says the same to Hugging Face's
``tokenizers``: all pairs that make a piece, the best piece first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .restore_parts import (
    added_token,
    is_padding,
    json_bytes,
    said_roles,
    settings_of,
    template_of,
)
from .restore_ranked import ranked_merges
from .spm import ADDED_SCORE, UNUSED_SCORE
from .spm_proto import BPE, SpmSettings, write_model
from .vocabulary import TokenType, Vocabulary

_SPACE = "\u2581"
_LISTED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def spm_files(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files; ``tokenizer_config.json`` takes in ``settings``.

    Tokens that were added around the model have a score of their own; they go into the settings
    and, when they come after it, not into the model. A vocabulary that was made of a
    ``tokenizer.json`` alone becomes that again.

    Raises:
        FormatError: tokens that are not text.
    """
    texts = [str(text) for text in vocabulary.tokens]
    kinds = list(vocabulary.types)
    scores = [0.0] * len(texts) if vocabulary.scores is None else vocabulary.scores.tolist()
    around = {
        n
        for n, kind in enumerate(kinds)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED) and scores[n] == ADDED_SCORE
    }
    size = len(texts)
    while size and (size - 1 in around or _is_bare_padding(vocabulary, scores, size - 1)):
        size -= 1
    ids = {role: n for role, n in vocabulary.specials.ids.items() if n < size}
    unknown = ids.setdefault("unk", _unknown(texts, kinds, size))
    pieces = [
        (texts[n], 0.0 if n in around else scores[n], _kind(kinds[n], n == unknown))
        for n in range(size)
    ]
    prefix = vocabulary.add_space_prefix is not False
    model = write_model(pieces, SpmSettings(BPE, add_prefix=prefix, remove_spaces=False), ids)
    listed = [
        added_token(n, texts[n], special=kind != TokenType.USER_DEFINED)
        for n, kind in enumerate(kinds)
        if kind in _LISTED and not is_padding(vocabulary, n)
    ]
    # a model file knows no tokens of a user's with scores of their own: they came without one
    merges = None
    if any(
        k == TokenType.USER_DEFINED and s != ADDED_SCORE for k, s in zip(kinds, scores, strict=True)
    ):
        merges = ranked_merges(pieces)
    document = _document(vocabulary, texts, pieces, listed, unknown, merges)
    full = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings_of(vocabulary, texts, {t["id"] for t in listed}, said_roles(vocabulary)),
        **({} if vocabulary.add_space_prefix is None else {"add_prefix_space": prefix}),
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"}
            for t in listed
            if t["id"] in around
        },
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    return {
        **({"tokenizer.model": model} if merges is None else {}),
        "tokenizer.json": json_bytes(document),
        "tokenizer_config.json": json_bytes(full),
    }


def _kind(kind: int, is_unknown: bool) -> int:
    """SentencePiece wants exactly one unknown piece."""
    if is_unknown:
        return int(TokenType.UNKNOWN)
    return int(TokenType.NORMAL if kind == TokenType.UNKNOWN else kind)


def _is_bare_padding(vocabulary: Vocabulary, scores: Sequence[float], index: int) -> bool:
    return is_padding(vocabulary, index) and scores[index] == UNUSED_SCORE


def _unknown(texts: Sequence[str], kinds: Sequence[int], size: int) -> int:
    marked = [n for n in range(size) if kinds[n] == TokenType.UNKNOWN]
    if marked:
        return marked[0]
    return texts.index("<unk>", 0, size) if "<unk>" in texts[:size] else 0


def _document(
    vocabulary: Vocabulary,
    texts: Sequence[str],
    pieces: Sequence[tuple[str, float, int]],
    listed: list[dict[str, Any]],
    unknown: int,
    merges: list[tuple[str, str]] | None,
) -> dict[str, Any]:
    prefix = vocabulary.add_space_prefix is not False
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    before = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    after = [strip] if prefix else []
    vocab = {text: n for n, (text, _, _) in enumerate(pieces)}
    last = listed[-1]["id"] if listed else -1
    beyond = [t["id"] for t in listed if t["id"] >= len(pieces)]
    if beyond != list(range(len(pieces), last + 1)):  # gaps: only the model's vocabulary keeps ids
        vocab |= {texts[n]: n for n in beyond}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": listed,
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "pre_tokenizer": None,
        "post_processor": template_of(vocabulary, texts),
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": texts[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": merges is not None
            or any(kind == TokenType.BYTE for _, _, kind in pieces),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(pieces) if merges is None else merges,
        },
    }


def _merges(pieces: Sequence[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that make a piece, best score first, then by ids of the parts."""
    ids = {text: n for n, (text, _, kind) in enumerate(pieces) if kind == TokenType.NORMAL}
    found = []
    for text, index in ids.items():
        score = pieces[index][1]
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                found.append((-score, index, left, right))
    return [(pieces[left][0], pieces[right][0]) for _, _, left, right in sorted(found)]
