"""What a piece of work takes: wall and processor time, bytes through system calls, peak memory.

Processes that were forked for the work count in: the system adds their times and bytes to this
process once they have ended (``getrusage``, ``/proc/self/io``), and each tells its own peak before.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

_IO = Path("/proc/self/io")
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that a worker process had at once.

    Attributes:
        nbytes: resident bytes; pages that it shares with others count in.
    """

    nbytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used.

    Attributes:
        seconds: wall time.
        cpu_seconds: user and system time of all processes.
        read_bytes, written_bytes: through system calls, of all processes; None where the system
            does not tell.
        peaks: resident bytes at most, of this process and of each worker. Each has its own peak at
            its own time, and shared pages count in every one, so their sum is an upper bound.
    """

    seconds: float
    cpu_seconds: float
    read_bytes: int | None
    written_bytes: int | None
    peaks: tuple[int, ...]


_told: list[Peak] = []  # by worker processes since the last meter started


def own_peak() -> Peak:
    """The peak of this process."""
    return Peak(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT)


def tell(peak: Peak) -> None:
    """Note the peak of a worker process that has ended."""
    _told.append(peak)


class Meter:
    """Measures from when it is made; one at a time."""

    def __init__(self) -> None:
        """Start."""
        _told.clear()
        self._began, self._cpu, self._io = monotonic(), _cpu_seconds(), _transferred()

    def usage(self) -> Usage:
        """What was used until now."""
        io = _transferred()
        moved = [b - a for a, b in zip(self._io, io, strict=True)] if self._io and io else None
        return Usage(
            seconds=monotonic() - self._began,
            cpu_seconds=_cpu_seconds() - self._cpu,
            read_bytes=moved[0] if moved else None,
            written_bytes=moved[1] if moved else None,
            peaks=(own_peak().nbytes, *(p.nbytes for p in _told)),
        )


def _cpu_seconds() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, who))


def _transferred() -> tuple[int, int] | None:
    """Bytes read and written by this process and by its children that have ended (Linux)."""
    try:
        fields = dict(line.split(": ") for line in _IO.read_text().splitlines())
        return int(fields["rchar"]), int(fields["wchar"])
    except (OSError, ValueError, KeyError):
        return None
