"""Training data: a file of tokens, cut into samples, in an order that nobody has to remember.

Tokens lie in a one-dimensional ``.npy`` file and are mapped, not read. Sample i is the tokens
[i * seq_len, (i + 1) * seq_len], one more than it has labels. Which sample comes when is a pure
function of (seed, epoch, index), a Feistel permutation in O(1) memory: there is no loader state,
and a rank's part follows from its number alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..errors import ConfigError, FormatError

_ROUNDS = 4


def write_tokens(path: Path, tokens: np.ndarray) -> None:
    """Write token ids as uint16 when they fit, else as uint32."""
    small = tokens.size == 0 or int(tokens.max()) <= np.iinfo(np.uint16).max
    np.save(path, tokens.astype(np.uint16 if small else np.uint32))


@dataclass(frozen=True, slots=True)
class TokenData:
    """Samples of ``seq_len`` tokens and their labels.

    Attributes:
        tokens: uint16 or uint32 [n], mapped.
        seq_len: tokens per sample.
        seed: of the order.
    """

    tokens: np.ndarray
    seq_len: int
    seed: int

    @property
    def samples(self) -> int:
        """Number of samples of an epoch."""
        return (len(self.tokens) - 1) // self.seq_len

    def sample(self, index: int) -> np.ndarray:
        """Return int64 [seq_len + 1] of the sample that comes ``index``-th, over all epochs."""
        epoch, position = divmod(index, self.samples)
        start = permuted(position, self.samples, (self.seed, epoch)) * self.seq_len
        return self.tokens[start : start + self.seq_len + 1].astype(np.int64)

    def batch(self, step: int, batch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return int64 [batch / world_size, seq_len + 1]: this rank's part of a step's batch."""
        part = batch // world_size
        first = step * batch + rank * part
        return np.stack([self.sample(i) for i in range(first, first + part)])


def open_tokens(path: Path, seq_len: int, seed: int, vocab_size: int) -> TokenData:
    """Open a token file.

    Raises:
        FormatError: it is not a one-dimensional array of uint16 or uint32.
        ConfigError: it is shorter than one sample, or has ids beyond the vocabulary.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as a token file ({error})") from error
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise FormatError(
            f"{path}: holds {tokens.dtype} {list(tokens.shape)}, not a row of uint16 or uint32"
        )
    if len(tokens) <= seq_len:
        raise ConfigError(f"{path}: {len(tokens)} tokens are less than one sample of {seq_len} + 1")
    if int(tokens.max()) >= vocab_size:
        raise ConfigError(
            f"{path}: token {int(tokens.max())} is beyond model.vocab_size={vocab_size}"
        )
    return TokenData(tokens, seq_len, seed)


def permuted(index: int, size: int, key: tuple[int, ...]) -> int:
    """Return where ``index`` goes in a permutation of ``range(size)`` that ``key`` chooses.

    A Feistel network permutes the next power of four; indices that land outside walk on.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            text = repr((key, turn, right)).encode()
            noise = int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
            left, right = right, left ^ (noise & mask)
        index = left << half | right
        if index < size:
            return index
