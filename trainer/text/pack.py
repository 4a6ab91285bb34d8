"""Packing documents into samples of one length without cutting any that fits: first-fit decreasing.

A document of n tokens makes n - 1 predictions; one with more than a sample holds is cut into
pieces. The longest pieces are placed first, each into the first sample with room. The result is a
table [pieces, 3]: sample, first token, number of predictions.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np

_NONE = 1 << 62


def pack(starts: np.ndarray, total: int, seq_len: int) -> np.ndarray:
    """Place all documents.

    Args:
        starts: int64 [documents], where documents start.
        total: number of tokens.
        seq_len: predictions per sample.

    Returns:
        int64 [pieces, 3], sorted by sample, then by place in it.
    """
    pieces = cut(starts, total, seq_len)
    order = np.argsort(-pieces[:, 1], kind="stable")
    placed = np.empty(len(pieces), np.int64)
    waiting: list[list[int]] = [[] for _ in range(seq_len + 1)]  # heaps of samples, by their room
    first = np.full(seq_len + 1, _NONE)  # the first of each
    samples = 0
    for index, size in zip(order.tolist(), pieces[order, 1].tolist(), strict=True):
        room = size + int(first[size:].argmin())
        if first[room] == _NONE:
            room, sample, samples = seq_len, samples, samples + 1
        else:
            sample = heappop(waiting[room])
            first[room] = waiting[room][0] if waiting[room] else _NONE
        heappush(waiting[room - size], sample)
        first[room - size] = waiting[room - size][0]
        placed[index] = sample
    by_sample = order[np.argsort(placed[order], kind="stable")]
    return np.column_stack((placed[by_sample], pieces[by_sample]))


def cut(starts: np.ndarray, total: int, seq_len: int) -> np.ndarray:
    """Return int64 [pieces, 2]: first token and number of predictions of every piece."""
    ends = np.append(starts[1:], total)
    sizes = ends - starts - 1
    counts = -(-sizes // seq_len)
    owner = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[owner] + nth * seq_len
    return np.column_stack((first, np.minimum(seq_len, sizes[owner] - nth * seq_len)))
