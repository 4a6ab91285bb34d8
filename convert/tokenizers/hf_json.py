"""Read ``tokenizer.json`` (or ``vocab.json`` + ``merges.txt``, or ``vocab.txt``) into plain data.

Format: the serialization of Hugging Face ``tokenizers``. Merges come as ``"a b"`` or as
``["a", "b"]``; a space inside a merge part is written as the byte-level letter for a space, since
GGUF keeps a pair as one string with a space between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError
from .files import TokenizerFiles
from .special import ROLES, token_text

#: Tokenizer classes that name the special tokens which their files leave out.
_CLASS_SPECIALS: Mapping[str, tuple[str, ...]] = {
    "GPT2Tokenizer": ("<|endoftext|>",),
    "Qwen2Tokenizer": ("<|endoftext|>",),
    "CodeGenTokenizer": ("<|endoftext|>",),
    "BertTokenizer": ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"),
}


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched before the model runs."""

    id: int
    content: str
    special: bool
    normalized: bool


@dataclass(frozen=True, slots=True)
class BpeTokenizer:
    """A BPE or WordPiece tokenizer: ``vocab`` maps text to id, ``added`` is by id, ``document`` the
    JSON.
    """

    path: str
    vocab: Mapping[str, int]
    merges: Sequence[str]
    added: Mapping[int, AddedToken]
    document: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        """The ``model`` object of ``tokenizer.json``; empty for the two-file form."""
        return self.document.get("model") or {}

    @property
    def size(self) -> int:
        """Highest id plus one."""
        return max([*self.vocab.values(), *self.added], default=-1) + 1

    def has(self, token: str) -> bool:
        """Return whether a token exists, added or not."""
        return token in self.vocab or any(t.content == token for t in self.added.values())


def load_bpe(files: TokenizerFiles, kind: str = "BPE") -> BpeTokenizer:
    """Read the tokenizer of a folder, as ``tokenizer.json`` or in the older files of its kind.

    Args:
        files: the folder.
        kind: ``BPE`` (else in ``vocab.json`` and ``merges.txt``) or ``WordPiece`` (else in
            ``vocab.txt``; has no merges).

    Raises:
        ConfigError: neither form is there, the model is of another kind, or an entry is malformed.
    """
    settings = files.json("tokenizer_config.json") or {}
    document = files.json("tokenizer.json")
    if document is not None:
        path = str(files.folder / "tokenizer.json")
        model = document.get("model") or {}
        found_kind = model.get("type", "BPE")
        if found_kind != kind or not isinstance(model.get("vocab"), dict):
            raise ConfigError(f"{path}: holds a {found_kind} model where {kind} is needed")
        vocab, merges = model["vocab"], _merges(path, model.get("merges") or [])
    else:
        document, (path, vocab, merges) = {}, (_two_files if kind == "BPE" else _lines)(files)
    if not all(type(index) is int and index >= 0 for index in vocab.values()):
        raise ConfigError(f"{path}: the vocabulary holds ids that are no whole numbers")
    if not all(isinstance(merge, str) for merge in merges):
        raise ConfigError(f"{path}: merges are neither strings nor pairs of strings")
    added = {token.id: token for token in _added(path, document, settings, files)}
    found = BpeTokenizer(path, vocab, merges, added, document, settings)
    return _name_specials(found)


def _two_files(files: TokenizerFiles) -> tuple[str, Mapping[str, int], Sequence[str]]:
    path = files.path("vocab.json")
    vocab, merges = files.json("vocab.json"), files.text("merges.txt")
    if path is None or vocab is None or merges is None:
        raise ConfigError(f"{files.folder}: needs tokenizer.json, or vocab.json and merges.txt")
    lines = merges.splitlines()
    if lines and lines[0].startswith("#"):
        lines = lines[1:]
    pairs = [line.split() for line in lines]
    return str(path), vocab, [" ".join(pair) for pair in pairs if len(pair) == 2]


def _lines(files: TokenizerFiles) -> tuple[str, Mapping[str, int], Sequence[str]]:
    """Read ``vocab.txt``: one token per line, the line number is the id."""
    text = files.text("vocab.txt")
    if text is None:
        raise ConfigError(f"{files.folder}: needs tokenizer.json or vocab.txt")
    lines = text.removesuffix("\n").split("\n")
    return str(files.folder / "vocab.txt"), {line: n for n, line in enumerate(lines)}, ()


def _merges(path: str, merges: Sequence[Any]) -> Sequence[str]:
    if not merges or isinstance(merges[0], str):
        return merges
    try:
        return [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merges]
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: merges are neither strings nor pairs of strings") from error


def _added(
    path: str,
    document: Mapping[str, Any],
    settings: Mapping[str, Any],
    files: TokenizerFiles,
) -> list[AddedToken]:
    """Return the added tokens of all places; an id that comes twice keeps its first entry."""
    listed: Any = document.get("added_tokens") or []
    decoder: Any = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(isinstance(t, dict) for t in listed):
        raise ConfigError(f"{path}: the added tokens are not listed as objects")
    raw: list[tuple[object, Any]] = [(t.get("id"), t) for t in listed]
    raw += list(decoder.items())
    if not document:
        listed = files.json("added_tokens.json") or {}
        raw += [(index, {"content": text, "normalized": True}) for text, index in listed.items()]
    seen: dict[int, AddedToken] = {}
    for index, token in raw:
        text = token_text(token)
        if text is None or not str(index).isdecimal():
            raise ConfigError(f"{path}: the added token {token!r} lacks its content or id")
        special = bool(token.get("special", False))
        number = int(str(index))
        seen.setdefault(
            number, AddedToken(number, text, special, bool(token.get("normalized", not special)))
        )
    return list(seen.values())


def _name_specials(found: BpeTokenizer) -> BpeTokenizer:
    """Mark the tokens that the settings name as bos, eos, ... as special, as the library does."""
    names = [token_text(found.settings.get(f"{role}_token")) for role in ROLES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = found.settings.get(key)
        names += [token_text(entry) for entry in more] if isinstance(more, list) else []
    if not found.document:
        default = "BertTokenizer" if found.path.endswith("vocab.txt") else ""
        named = str(found.settings.get("tokenizer_class") or default).removesuffix("Fast")
        names += _CLASS_SPECIALS.get(named, ())
    added = dict(found.added)
    by_text = {token.content: token for token in added.values()}
    for name in names:
        if name is None:
            continue
        if name in by_text:
            token = by_text[name]
            added[token.id] = replace(token, special=True)
        elif name in found.vocab:
            added[found.vocab[name]] = AddedToken(found.vocab[name], name, True, False)
    return replace(found, added=added)
