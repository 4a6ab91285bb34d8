"""Splitting a write over processes: which of the payloads each one makes.

Payloads stay in source order within runs, so that every process reads long stretches; the runs are
dealt by falling size to whoever has least. Everyone computes the same split from the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import TypeVar

T = TypeVar("T")
_RUNS = 16  # per process: enough to come out even, few enough to read in stretches


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the work a process does.

    Attributes:
        rank: this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def of(self, items: Sequence[T], nbytes: Sequence[int]) -> list[T]:
        """The items of this process, in their order.

        Args:
            items: in source order.
            nbytes: the work that each one is.
        """
        if self.size == 1:
            return list(items)
        owner = split(nbytes, self.size)
        return [item for item, rank in zip(items, owner, strict=True) if rank == self.rank]


def split(nbytes: Sequence[int], size: int) -> list[int]:
    """Return the owner of each item; sums differ by about one item or run at most.

    Args:
        nbytes: the work that each item is, in source order.
        size: number of processes.
    """
    length = max(1, sum(nbytes) // (size * _RUNS))
    runs: list[tuple[int, int, int]] = []  # bytes, first item, end
    first, held = 0, 0
    for k, n in enumerate(nbytes):
        held += n
        if held >= length:
            runs.append((held, first, k + 1))
            first, held = k + 1, 0
    if first < len(nbytes):
        runs.append((held, first, len(nbytes)))
    owner = [0] * len(nbytes)
    load = [(0, rank) for rank in range(size)]
    heapify(load)
    for held, first, end in sorted(runs, key=lambda run: (-run[0], run[1])):
        least, rank = load[0]
        owner[first:end] = [rank] * (end - first)
        heapreplace(load, (least + held, rank))
    return owner
