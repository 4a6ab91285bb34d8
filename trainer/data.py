"""Training data: token files cut or packed into samples, in an order that nobody has to remember.

``concat``: sample i has the tokens [i * seq_len, (i + 1) * seq_len] of the file; the last one is
padded. ``first_fit``: whole documents share a sample (``text/pack.py``). Which sample comes when is
a pure function of (seed, epoch, index), a Feistel permutation in O(1) memory: there is no loader
state, and a rank's part follows from its number alone, for every number of ranks.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from ..errors import ConfigError
from .batch import IGNORE, Batch
from .sections import DataConfig
from .text.pack import pack
from .text.token_file import TokenFile, open_token_file
from .text.tokenize import tokenize
from .text.tokenizer import digest

_ROUNDS = 6
_TOKEN_FILES = (".npy", ".bin")

#: One row of each part of a batch, int64 [4, seq]: inputs, labels, positions, documents.
_Row = np.ndarray


@dataclass(frozen=True, slots=True)
class TokenData:
    """Samples of ``seq_len`` tokens; a ``DataSource``.

    Attributes:
        file: the tokens.
        seq_len: tokens per sample.
        seed: of the order.
        separate: whether documents of a sample are kept apart (where the file knows them).
        packs: int64 [pieces, 3] of ``pack``; None for ``concat``.
    """

    file: TokenFile
    seq_len: int
    seed: int
    separate: bool = True
    packs: np.ndarray | None = None

    @property
    def samples(self) -> int:
        """Number of samples of an epoch."""
        if self.packs is not None:
            return int(self.packs[-1, 0]) + 1
        return -(-(len(self.file.tokens) - 1) // self.seq_len)

    def fingerprint(self) -> str:
        """Return a digest of everything that decides which tokens come when."""
        kind = "concat" if self.packs is None else "first_fit"
        said = [self.file.fingerprint(), self.seq_len, self.seed, self.separate, kind]
        return blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()

    def batch(self, step: int, batch: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return a rank's part of a step's batch (see ``DataSource``)."""
        part = batch // world_size
        first = step * batch + rank * part
        return self._rows(self.order(np.arange(first, first + part)))

    def in_order(self, first: int, count: int) -> Batch:
        """Return samples as they lie in the file, for evaluation; none is learned past the end."""
        places = np.arange(first, first + count)
        batch = self._rows(np.minimum(places, self.samples - 1))
        batch.labels[torch.from_numpy(places >= self.samples)] = IGNORE
        return batch

    def order(self, indices: np.ndarray) -> np.ndarray:
        """Return which samples come at these places, counted over all epochs. int64 [n] each."""
        epochs, places = np.divmod(indices, self.samples)
        chosen = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = permuted(places[here], self.samples, (self.seed, epoch))
        return chosen

    def _rows(self, samples: np.ndarray) -> Batch:
        row = self._joined if self.packs is None else self._packed
        inputs, labels, positions, documents = torch.from_numpy(
            np.stack([row(int(sample)) for sample in samples], 1)
        )
        apart = self.separate and (self.packs is not None or self.file.starts is not None)
        return Batch(inputs, labels, positions, documents if apart else None)

    def _joined(self, sample: int) -> _Row:
        """Tokens as they follow each other."""
        begin = sample * self.seq_len
        row = self._empty()
        size = min(self.seq_len, len(self.file.tokens) - 1 - begin)
        self._fill(row, 0, begin, size)
        starts = self.file.starts
        if starts is None or not self.separate:
            row[2] = np.arange(self.seq_len)
            return row
        low, high = np.searchsorted(starts, (begin, begin + size), "right")
        inside = starts[low:high] - begin  # places of the sample at which a document starts
        row[1, inside - 1] = IGNORE  # nothing foretells how the next document begins
        row[3, :size] = np.searchsorted(inside, np.arange(size), "right")
        row[3, size:] = len(inside) + 1
        firsts = np.concatenate(([0], inside, [size]))
        row[2] = np.arange(self.seq_len) - firsts[row[3]]
        return row

    def _packed(self, sample: int) -> _Row:
        """Whole documents, or pieces of long ones."""
        assert self.packs is not None, "only called so"
        low, high = np.searchsorted(self.packs[:, 0], (sample, sample + 1))
        row = self._empty()
        at = 0
        for number, (_, begin, size) in enumerate(self.packs[low:high].tolist()):
            self._fill(row, at, begin, size)
            row[2, at : at + size] = np.arange(size)
            row[3, at : at + size] = number
            at += size
        row[2, at:] = np.arange(self.seq_len - at)
        row[3, at:] = high - low
        if not self.separate:
            row[2] = np.arange(self.seq_len)
        return row

    def _empty(self) -> _Row:
        row = np.zeros((4, self.seq_len), np.int64)
        row[1] = IGNORE
        return row

    def _fill(self, row: _Row, at: int, begin: int, size: int) -> None:
        """Put ``size`` predictions that start at token ``begin`` at place ``at``."""
        ids = self.file.tokens[begin : begin + size + 1]
        row[0, at : at + size] = ids[:-1]
        row[1, at : at + size] = ids[1:]
        if self.file.learned is not None:
            learned = self.file.learned[begin + 1 : begin + size + 1]
            row[1, at : at + size][learned == 0] = IGNORE


def open_tokens(
    path: Path,
    seq_len: int,
    seed: int,
    vocab_size: int,
    *,
    packing: str = "auto",
    separate: bool = True,
    folder: Path | None = None,
) -> TokenData:
    """Open a token file.

    Args:
        path: the file, or the folder that ``mconv tokenize`` made.
        seq_len: tokens per sample.
        seed: of the order.
        vocab_size: of the model.
        packing: ``concat``, ``first_fit``, or ``auto``: the latter where not all is learned.
        separate: keep documents of a sample apart.
        folder: where ``prepare`` has put the packing; computed again if it is not there.

    Raises:
        FormatError: damaged files.
        ConfigError: shorter than a sample, ids beyond the vocabulary, nothing to learn.
    """
    file = open_token_file(path)
    if packing == "auto":
        packing = "concat" if file.learned is None or file.starts is None else "first_fit"
    if packing == "concat" and len(file.tokens) <= seq_len:
        raise ConfigError(
            f"{path}: {len(file.tokens)} tokens are less than one sample of {seq_len} + 1"
        )
    if file.largest() >= vocab_size:
        raise ConfigError(f"{path}: token {file.largest()} is beyond model.vocab_size={vocab_size}")
    if file.about.get("learned") == 0:
        raise ConfigError(f"{path}: nothing in it is learned (no message of the assistant?)")
    data = TokenData(file, seq_len, seed, separate)
    if packing == "concat":
        return data
    if file.starts is None:
        raise ConfigError(f"{path}: does not say where documents start; use data.packing 'concat'")
    known = _pack_file(data, folder) if folder else None
    if known is not None and known.is_file():
        return replace(data, packs=np.load(known, mmap_mode="r", allow_pickle=False))
    packs = pack(np.asarray(file.starts), len(file.tokens), seq_len)
    if not len(packs):
        raise ConfigError(f"{path}: no document has two tokens")
    return replace(data, packs=packs)


def prepare(data: DataConfig, seq_len: int, folder: Path) -> None:
    """Do once, on one rank, what all need: encode text, pack documents. Others wait meanwhile.

    Args:
        data: ``tokens`` may be text (see ``text/documents.py``), which is encoded into ``folder``.
        seq_len: tokens per sample.
        folder: for what is made.
    """
    path = token_path(data, folder)
    if path != data.tokens and not path.exists():
        tokenize([data.tokens], path, tokenizer=data.tokenizer, separator=data.separator)
    file = open_tokens(path, seq_len, 0, 1 << 32, packing=data.packing, folder=folder)
    if file.packs is None:
        return
    target = _pack_file(file, folder)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}")
        with part.open("wb") as out:
            np.save(out, file.packs)
        part.replace(target)


def open_data(
    data: DataConfig, seq_len: int, seed: int, vocab_size: int, folder: Path
) -> TokenData:
    """Open what ``prepare`` has made ready; on every rank.

    Raises:
        ConfigError: as ``open_tokens``, or the tokens are of another tokenizer.
        FormatError: damaged files.
    """
    path = token_path(data, folder)
    made = open_token_file(path).about.get("tokenizer_sha256")
    if made and digest(data.tokenizer) not in ("", made):
        raise ConfigError(
            f"{path}: was made with another tokenizer than {data.tokenizer}: what ids mean would "
            "be wrong; tokenize the text again"
        )
    return open_tokens(
        path,
        seq_len,
        seed,
        vocab_size,
        packing=data.packing,
        separate=data.separate,
        folder=folder,
    )


def token_path(data: DataConfig, folder: Path) -> Path:
    """Return where the tokens lie: as given, or where text is encoded to in ``folder``."""
    path = data.tokens
    if path.suffix in _TOKEN_FILES or (path / "tokens.npy").is_file() or not path.exists():
        return path
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files += sorted(p for p in data.tokenizer.iterdir() if p.is_file())
    known = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    digest = blake2b(json.dumps([known, data.separator]).encode(), digest_size=6).hexdigest()
    return folder / "data" / f"{path.stem}-{digest}"


def _pack_file(data: TokenData, folder: Path) -> Path:
    return folder / "data" / f"packs-{data.file.fingerprint()[:12]}-{data.seq_len}.npy"


def permuted(indices: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Return where ``indices`` go in a permutation of ``range(size)`` that ``key`` chooses.

    A Feistel network permutes the next power of four; indices that land outside walk on.

    Args:
        indices: int64 [n], each below ``size``.
        size: of the permutation.
        key: chooses it.

    Returns:
        int64 [n].
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    digest = blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")
    out = indices.astype(np.uint64)
    outside = np.ones(len(out), bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for one in keys:
            left, right = right, left ^ (_mixed(right + one) & mask)
        out[outside] = left << half | right
        outside = out >= np.uint64(size)
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (the finalizer of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
