"""Splitting a write over processes: which of the payloads each one makes.

Two processes that write one file wait for each other in the kernel: it locks a file for each write.
So whole files are dealt where that comes out even, else payloads in runs of source order, so that
every process reads long stretches; by falling size, to whoever has least. Everyone computes the
same split from the same plan.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import TypeVar

T = TypeVar("T")
_RUNS = 16  # per process: enough to come out even, few enough to read in stretches
_UNEVEN = 1.1  # the fullest process with whole files, against all having the same


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the work a process does.

    Attributes:
        rank: this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def of(
        self, items: Sequence[T], nbytes: Sequence[int], files: Sequence[Collection[int]]
    ) -> list[T]:
        """The items of this process, in their order.

        Args:
            items: in source order.
            nbytes: the work that each one is.
            files: which files each one writes.
        """
        if self.size == 1:
            return list(items)
        owner = split_files(nbytes, files, self.size) or split(nbytes, self.size)
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
    for (_, first, end), rank in zip(runs, deal([r[0] for r in runs], size), strict=True):
        owner[first:end] = [rank] * (end - first)
    return owner


def split_files(
    nbytes: Sequence[int], files: Sequence[Collection[int]], size: int
) -> list[int] | None:
    """Return the owner of each item so that no file has two; None when that is too uneven.

    Args:
        nbytes: the work that each item is.
        files: which files each item writes.
        size: number of processes.
    """
    if any(len(f) != 1 for f in files):
        return None
    whole: dict[int, int] = {}
    for n, (file,) in zip(nbytes, files, strict=True):
        whole[file] = whole.get(file, 0) + n
    ranks = deal(list(whole.values()), size)
    load = [0] * size
    for n, rank in zip(whole.values(), ranks, strict=True):
        load[rank] += n
    if max(load) * size > _UNEVEN * sum(load):
        return None
    owner = dict(zip(whole, ranks, strict=True))
    return [owner[file] for (file,) in files]


def deal(nbytes: Sequence[int], size: int) -> list[int]:
    """Return a rank for each amount of work, by falling size to whoever has least."""
    load = [(0, rank) for rank in range(size)]
    heapify(load)
    ranks = [0] * len(nbytes)
    for k in sorted(range(len(nbytes)), key=lambda k: (-nbytes[k], k)):
        held, ranks[k] = load[0]
        heapreplace(load, (held + nbytes[k], ranks[k]))
    return ranks
