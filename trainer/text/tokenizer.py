"""Tokenizers: text to ids and back, through SentencePiece or Hugging Face's ``tokenizers``.

A folder with ``tokenizer.json`` is read by ``tokenizers``, one with ``tokenizer.model`` alone by
SentencePiece. Which ids stand around a document is said by the post-processor or
``tokenizer_config.json``, read as for GGUF, so that training and inference agree. Training a small
one is in ``train_tokenizer.py``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from ...convert.tokenizers.files import TokenizerFiles
from ...convert.tokenizers.special import load_specials, token_text
from ...errors import ConfigError
from ...shardio.protobuf import fields, first

MODEL = "tokenizer.model"
FAST = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_MANY = 256  # texts handed over at once


class Tokenizer(ABC):
    """A tokenizer and the tokens around a document.

    Attributes:
        folder: where it lies.
        bos, eos: ids of the first and last token of a document; None where there is none.
        add_bos: whether a document starts with ``bos``.
        special: text of the special tokens, to their ids.
        vocab_size: number of ids.
    """

    folder: Path
    bos: int | None = None
    eos: int | None = None
    add_bos: bool = False
    special: Mapping[str, int]
    vocab_size: int

    def bos_id(self) -> int:
        """Return the first token of a document, -1 if there is none (as SentencePiece does)."""
        return -1 if self.bos is None else self.bos

    def eos_id(self) -> int:
        """Return the token that ends a document, -1 if there is none."""
        return -1 if self.eos is None else self.eos

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Return the ids of a text; ``add_bos`` puts ``bos`` first if documents start so."""
        return [*(self._before() if add_bos else []), *self.encode_all([text])[0]]

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return int64 ids of whole documents: ``bos`` (if usual), text, ``eos``."""
        before, after = self._before(), [] if self.eos is None else [self.eos]
        return [
            np.array([*before, *ids, *after], np.int64)
            for start in range(0, len(texts), _MANY)
            for ids in self.encode_all(texts[start : start + _MANY])
        ]

    def _before(self) -> list[int]:
        return [self.bos] if self.add_bos and self.bos is not None else []

    @abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts."""

    @abstractmethod
    def marked(self, text: str) -> tuple[list[int], list[int]]:
        """Return ids, and for each the character of ``text`` at which it starts.

        The texts of special tokens become those tokens; nothing is added.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""


class _Pieces(Tokenizer):
    """SentencePiece, with the special tokens that were added to it."""

    def __init__(self, path: Path, added: Mapping[str, int]) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        count = self.model.vocab_size()
        own = {self.model.id_to_piece(i): i for i in range(count) if self.model.is_control(i)}
        self.special = {**own, **added}
        self.vocab_size = max([count, *(i + 1 for i in added.values())])
        self._beyond = {i for i in added.values() if i >= count}
        longest_first = sorted(self.special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.encode(list(texts))

    def marked(self, text: str) -> tuple[list[int], list[int]]:
        """As llama.cpp does: each text between special tokens is encoded as a text of its own."""
        found: list[tuple[int, int]] = []
        parts = self._cut.split(text) if self.special else [text]
        for part, end in zip(parts, accumulate(map(len, parts)), strict=True):
            begin = end - len(part)
            if part in self.special:
                found.append((self.special[part], begin))
            elif part:
                found += [(token, begin + start) for token, start in self._places(part)]
        return [token for token, _ in found], [start for _, start in found]

    def _places(self, text: str) -> list[tuple[int, int]]:
        """Return ids and where they start; the library counts bytes, and only its serialized
        answer (``SentencePieceText``) is the same in all its versions."""
        answer = fields(self.model.encode(text, out_type="serialized_proto"))
        pieces = [fields(piece) for piece in answer.get(2, []) if isinstance(piece, bytes)]
        raw = text.encode()
        heads = np.frombuffer(raw, np.uint8) & 0xC0 != 0x80  # first bytes of characters
        before = np.concatenate(([0], np.cumsum(heads)))
        return [(first(piece, 2, 0), int(before[first(piece, 4, 0)])) for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.model.decode([int(i) for i in ids if i not in self._beyond]))


class _Fast(Tokenizer):
    """Hugging Face's ``tokenizers``."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.model = Fast.from_file(str(path))
        added = self.model.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = int(self.model.get_vocab_size())

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        made = self.model.encode_batch(list(texts), add_special_tokens=False)
        return [list(one.ids) for one in made]

    def marked(self, text: str) -> tuple[list[int], list[int]]:
        made = self.model.encode(text, add_special_tokens=False)
        return list(made.ids), [start for start, _ in made.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.model.decode([int(i) for i in ids]))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer of a folder.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    files = TokenizerFiles(folder)
    fast = files.path(FAST)
    settings = files.json(CONFIG) or {}
    path = folder / MODEL if fast is None else fast
    try:
        out = _Pieces(path, _added(settings)) if fast is None else _Fast(path)
    except Exception as error:  # tokenizers raises nothing more precise
        kind = "a SentencePiece model" if fast is None else "a file of the tokenizers library"
        raise ConfigError(f"{path}: not {kind} ({error})") from error
    specials = load_specials(files, None)
    roles: dict[str, int] = dict(specials.ids)
    if isinstance(out, _Pieces):
        own = {"bos": out.model.bos_id(), "eos": out.model.eos_id()}
        roles = {**{role: i for role, i in own.items() if i >= 0}, **roles}
        for role in own:
            named = out.special.get(token_text(settings.get(f"{role}_token")) or "")
            roles.update({} if named is None else {role: named})
    out.folder, out.bos, out.eos = folder, roles.get("bos"), roles.get("eos")
    out.add_bos = specials.add.get("bos", isinstance(out, _Pieces))
    return out


def encode_documents(documents: Sequence[str], folder: Path) -> np.ndarray:
    """Return all documents as one row of ids, each between its first and last token."""
    return np.concatenate(load_tokenizer(folder).documents(documents))


def _added(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the special tokens that ``tokenizer_config.json`` adds to the vocabulary."""
    entries = settings.get("added_tokens_decoder")
    found = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        text = token_text(entry)
        if text and str(key).isdigit() and entry.get("special"):
            found[text] = int(key)
    return found


def digest(folder: Path) -> str:
    """Return the SHA-256 of a tokenizer's file; empty where there is none."""
    path = next((folder / n for n in (FAST, MODEL) if (folder / n).is_file()), None)
    return sha256(path.read_bytes()).hexdigest() if path else ""
