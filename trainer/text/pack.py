"""Packing documents into samples of one length without cutting any that fits: first-fit decreasing.

A document of n tokens makes n - 1 predictions; one with more than a sample holds is cut into
pieces. The longest pieces are placed first, each into the first sample with room; room is looked up
in a segment tree over amounts of room, so a million documents take seconds. The result is a table
[pieces, 3]: sample, first token, number of predictions.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np


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
    rooms = _Rooms(seq_len)
    placed = np.empty(len(pieces), np.int64)
    for index, size in zip(order.tolist(), pieces[order, 1].tolist(), strict=True):
        placed[index] = rooms.take(size)
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


class _Rooms:
    """Samples by the room they have left, and the first one with enough of it."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.width = 1 << seq_len.bit_length()  # leaves 0 .. seq_len
        self.none = 1 << 62
        self.tree = [self.none] * (2 * self.width)
        self.waiting: list[list[int]] = [[] for _ in range(seq_len + 1)]
        self.samples = 0

    def take(self, size: int) -> int:
        """Return the sample that gets a piece of ``size``."""
        sample, room = self._first(size)
        if sample == self.none:
            sample, room = self.samples, self.seq_len
            self.samples += 1
        else:
            self._change(room, None)
        self._change(room - size, sample)
        return sample

    def _first(self, size: int) -> tuple[int, int]:
        """Return the lowest sample with at least ``size`` left, and how much it has."""
        best, at = self.none, 0
        low, high = size + self.width, 2 * self.width
        while low < high:
            if low & 1:
                best, at = min((best, at), (self.tree[low], low))
                low += 1
            if high & 1:
                high -= 1
                best, at = min((best, at), (self.tree[high], high))
            low, high = low >> 1, high >> 1
        while at and at < self.width:
            at = 2 * at if self.tree[2 * at] == best else 2 * at + 1
        return best, at - self.width

    def _change(self, room: int, sample: int | None) -> None:
        """Add a sample with this room, or (None) remove the lowest one."""
        heap = self.waiting[room]
        if sample is None:
            heappop(heap)
        else:
            heappush(heap, sample)
        at = room + self.width
        self.tree[at] = heap[0] if heap else self.none
        while at > 1:
            at >>= 1
            self.tree[at] = min(self.tree[2 * at], self.tree[2 * at + 1])
