"""Tokenizers: text to ids and back, through SentencePiece or Hugging Face's ``tokenizers``.

A folder with ``tokenizer.json`` is read by ``tokenizers``, one with ``tokenizer.model`` alone by
SentencePiece. Which ids stand around a document is said by the post-processor or
``tokenizer_config.json``, read as for GGUF, so that training and inference agree. Training a small
one is in ``train_tokenizer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

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


class _Backend(Protocol):
    """What differs between the libraries."""

    def size(self) -> int: ...

    def special(self) -> Mapping[str, int]: ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def marked(self, text: str) -> tuple[list[int], list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer and the tokens around a document.

    Attributes:
        folder: where it lies.
        bos, eos: ids of the first and last token of a document; None where there is none.
        add_bos: whether a document starts with ``bos``.
        special: text of the special tokens, to their ids.
    """

    folder: Path
    bos: int | None
    eos: int | None
    add_bos: bool
    special: Mapping[str, int]
    _backend: _Backend

    def vocab_size(self) -> int:
        """Return the number of ids."""
        return self._backend.size()

    def bos_id(self) -> int:
        """Return the first token of a document, -1 if there is none (as SentencePiece does)."""
        return -1 if self.bos is None else self.bos

    def eos_id(self) -> int:
        """Return the token that ends a document, -1 if there is none."""
        return -1 if self.eos is None else self.eos

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Return the ids of a text; ``add_bos`` puts ``bos`` first if documents start so."""
        first = [self.bos] if add_bos and self.add_bos and self.bos is not None else []
        return first + self._backend.encode([text])[0]

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return int64 ids of whole documents: ``bos`` (if usual), text, ``eos``."""
        first = [self.bos] if self.add_bos and self.bos is not None else []
        last = [] if self.eos is None else [self.eos]
        rows: list[np.ndarray] = []
        for start in range(0, len(texts), _MANY):
            for ids in self._backend.encode(texts[start : start + _MANY]):
                rows.append(np.array([*first, *ids, *last], np.int64))
        return rows

    def marked(self, text: str) -> tuple[list[int], list[int]]:
        """Return ids, and for each the character of ``text`` at which it starts.

        The texts of special tokens become those tokens; nothing is added.
        """
        return self._backend.marked(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self._backend.decode(ids)


class _Pieces:
    """SentencePiece, with the special tokens that were added to it."""

    def __init__(self, path: Path, added: Mapping[str, int]) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        count = self.model.vocab_size()
        own = {self.model.id_to_piece(i): i for i in range(count) if self.model.is_control(i)}
        self._special = {**own, **added}
        self._size = max([count, *(i + 1 for i in added.values())])
        self._names = {i: text for text, i in added.items() if i >= count}
        self._cut = _splitter(self._special)

    def size(self) -> int:
        return self._size

    def special(self) -> Mapping[str, int]:
        return self._special

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.encode(list(texts))

    def marked(self, text: str) -> tuple[list[int], list[int]]:
        """As llama.cpp does: each text between special tokens is encoded as a text of its own."""
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for part in self._cut.split(text) if self._special else [text]:
            if part in self._special:
                ids.append(self._special[part])
                starts.append(at)
            elif part:
                made = self._places(part)
                ids += [token for token, _ in made]
                starts += [at + start for _, start in made]
            at += len(part)
        return ids, starts

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
        return str(self.model.decode([int(i) for i in ids if i not in self._names]))


class _Fast:
    """Hugging Face's ``tokenizers``."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.model = Fast.from_file(str(path))
        added = self.model.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}

    def size(self) -> int:
        return int(self.model.get_vocab_size())

    def special(self) -> Mapping[str, int]:
        return self._special

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
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
    try:
        if fast is not None:
            backend: _Backend = _Fast(fast)
        else:
            backend = _Pieces(folder / MODEL, _added(settings))
    except Exception as error:  # tokenizers raises nothing more precise
        kind = "a SentencePiece model" if fast is None else "a file of the tokenizers library"
        path = folder / MODEL if fast is None else fast
        raise ConfigError(f"{path}: not {kind} ({error})") from error
    roles, adds = dict(load_specials(files, None).ids), load_specials(files, None).add
    if isinstance(backend, _Pieces):
        own = {"bos": backend.model.bos_id(), "eos": backend.model.eos_id()}
        roles = {**{role: i for role, i in own.items() if i >= 0}, **roles}
        for role in own:
            named = backend.special().get(token_text(settings.get(f"{role}_token")) or "")
            roles.update({} if named is None else {role: named})
    add_bos = adds.get("bos", isinstance(backend, _Pieces))
    return Tokenizer(
        folder, roles.get("bos"), roles.get("eos"), add_bos, backend.special(), backend
    )


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


def _splitter(texts: Mapping[str, int]) -> re.Pattern[str]:
    """Return a pattern whose split keeps the special texts; longer ones are found first."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest)) + ")")


def describe(folder: Path) -> dict[str, Any]:
    """Return what a token file remembers of its tokenizer: sizes, ids and a digest of its file."""
    tokenizer = load_tokenizer(folder)
    return {
        "vocab_size": tokenizer.vocab_size(),
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "tokenizer_sha256": digest(folder),
    }


def digest(folder: Path) -> str:
    """Return the SHA-256 of a tokenizer's file; empty where there is none."""
    path = next((folder / n for n in (FAST, MODEL) if (folder / n).is_file()), None)
    return sha256(path.read_bytes()).hexdigest() if path else ""
