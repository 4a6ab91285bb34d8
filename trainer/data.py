"""Training data: token files cut or packed into samples, in an order that nobody has to remember.

``concat``: sample i has the tokens [i * seq_len, (i + 1) * seq_len] of the file; the last one is
padded. ``first_fit``: whole documents share a sample (``text/pack.py``). Which sample comes when is
a pure function of (seed, epoch, index), a Feistel permutation in O(1) memory: there is no loader
state, and a rank's part follows from its number alone, for every number of ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from .batch import IGNORE, Batch
from .text.token_file import TokenFile

_ROUNDS = 6

#: One row of each part of a batch, int64 [4, seq]: inputs, labels, positions, documents.
_Row = np.ndarray


@dataclass(frozen=True, slots=True)
class TokenData:
    """Samples of ``seq_len`` tokens; a ``DataSource``."""

    file: TokenFile
    seq_len: int
    seed: int  # of the order
    separate: bool = True  # documents of a sample are kept apart (where the file knows them)
    packs: np.ndarray | None = None  # int64 [pieces, 3] of pack(); None for concat

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


def permuted(indices: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Return where ``indices`` (int64 [n], below ``size``) go in a permutation of ``range(size)``.

    ``key`` chooses it. A Feistel network permutes the next power of four; indices that land outside
    walk on.
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
