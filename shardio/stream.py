"""The streaming writer: fills files of known layout from payloads, in parallel, within a memory
budget.

Every output offset is known before the first byte is read. Threads take slabs from one queue that
is ordered by source file and offset, so inputs are read about sequentially; each holds at most one
slab. Finished payloads are journalled after their bytes are on disk, which is what makes
``--resume`` safe. Several processes (``shares``) take payloads of their own.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import OutputError
from .copying import copy_bytes, pwrite
from .payload import Copy, Group, Joint, Member, Payload, Slab
from .shares import Share
from .team import ALONE, HaltedError, Team

Progress = Callable[[int, int], None]

_Part = tuple[int, int, int]  # file, part of it, byte where the part starts
_Piece = tuple[Slab | Joint, list[_Part]]  # with one part per place

DEFAULT_MEMORY = 1 << 30
_SLAB = 4 << 20  # more only costs page faults and cache misses
_SYNC_EVERY = 1 << 30  # bytes between two syncs of the journal


@dataclass(frozen=True, slots=True)
class OutFile:
    """One output file.

    Attributes:
        name: path relative to the output folder.
        size: total bytes.
        parts: (offset, payload) pairs; they do not overlap.
    """

    name: str
    size: int
    parts: tuple[tuple[int, Payload], ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a write may use.

    Attributes:
        max_memory: bytes of working memory over all threads and processes of this call.
        threads: worker threads (None: one per core, at most 8).
        processes: processes to fork for the writing, among which memory and threads are divided.
        team: processes that were started for this job from outside; each has its own limits.
    """

    max_memory: int = DEFAULT_MEMORY
    threads: int | None = None
    processes: int = 1
    team: Team = ALONE

    def workers(self) -> int:
        """Number of threads; fewer when the budget is too small to give each one a slab."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        wanted = self.threads or min(8, cores or 1)
        return max(1, min(wanted, self.max_memory // (1 << 20)))

    def slab(self) -> int:
        """Bytes that producing one slab may need."""
        return max(64 << 10, min(_SLAB, self.max_memory // (2 * self.workers())))

    def part(self) -> Limits:
        """What each of the forked processes may use."""
        threads = max(1, self.workers() // self.processes)
        return Limits(self.max_memory // self.processes, threads)


@dataclass(slots=True)
class Journal:
    """Which payloads of which files are finished.

    Lines are only written for bytes already synced.
    """

    path: Path
    done: set[tuple[int, int]] = field(default_factory=set)

    def of(self, rank: int) -> Journal:
        """The journal of one of several processes, which has its own file."""
        return Journal(self.path.with_name(f"{self.path.name}.{rank}"), set(self.done))

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Read a journal, and those of several processes; a torn last line is ignored."""
        journal = cls(path)
        for part in (path, *path.parent.glob(f"{path.name}.*")):
            text = part.read_text(encoding="ascii", errors="ignore") if part.exists() else ""
            for line in text.splitlines():
                parts = line.split()
                if (
                    len(parts) == 3
                    and parts[2] == "ok"
                    and parts[0].isdigit()
                    and parts[1].isdigit()
                ):
                    journal.done.add((int(parts[0]), int(parts[1])))
        return journal

    def add(self, finished: Sequence[tuple[int, int]]) -> None:
        """Append finished (file, part) pairs durably."""
        with self.path.open("a", encoding="ascii") as f:
            f.writelines(f"{a} {b} ok\n" for a, b in finished)
            f.flush()
            os.fsync(f.fileno())
        self.done.update(finished)


def write_files(
    folder: Path,
    files: Sequence[OutFile],
    *,
    limits: Limits | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> None:
    """Write ``files`` into ``folder`` and sync them.

    Args:
        folder: where the files go; parents of nested names are made.
        files: what to write.
        limits: memory and threads.
        journal: skip what it lists, add what is finished.
        progress: called with (bytes done, bytes in all), from any thread.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
        FormatError: a source turned out short.
    """
    limits = limits or Limits()
    if limits.processes > 1:
        from .workers import write_in_processes  # which runs this module's threads

        write_in_processes(folder, files, limits, journal, progress)
    else:
        write_share(folder, files, limits, journal, progress)


def write_share(
    folder: Path,
    files: Sequence[OutFile],
    limits: Limits,
    journal: Journal | None,
    progress: Progress | None,
    *,
    share: Share = Share(),  # noqa: B008  # it is frozen
    halted: Callable[[], bool] | None = None,
) -> None:
    """Write what one process makes of the files; every process lays out all of them.

    Args:
        folder, files, limits, journal, progress: as for ``write_files``.
        share: which part.
        halted: asked before each slab; once it is true the work stops.

    Raises:
        HaltedError: another process failed.
        MconvError: as ``write_files``.
    """
    _Run(folder, files, limits, journal, progress, share, halted).run()


class _Run:
    """One call of ``write_share``."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[OutFile],
        limits: Limits,
        journal: Journal | None,
        progress: Progress | None,
        share: Share,
        halted: Callable[[], bool] | None,
    ) -> None:
        self.folder, self.files, self.limits = folder, files, limits
        self.journal, self.progress = journal, progress
        self.share, self.halted = share, halted
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.total = 0
        self.done_bytes = 0
        self.unsynced = 0
        self.left: dict[tuple[int, int], int] = {}
        self.finished: list[tuple[int, int]] = []
        self.fds: list[int] = []

    def run(self) -> None:
        try:
            self._open()
            queue = self._queue()
            with ThreadPoolExecutor(self.limits.workers(), "mconv-write") as pool:
                jobs = [pool.submit(self._work, queue) for _ in range(self.limits.workers())]
                try:
                    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                finally:
                    self.stop.set()  # also on Ctrl-C: nobody starts another slab
                for job in (*done, *jobs):
                    job.result()
            self._sync()
            if any(self.left.values()):
                raise HaltedError("stopped because another process failed")
        except OSError as e:
            raise output_error(self.folder, e) from e
        finally:
            self.stop.set()
            for fd in self.fds:
                os.close(fd)

    def _open(self) -> None:
        for f in self.files:
            path = self.folder / f.name
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            self.fds.append(fd)
            os.ftruncate(fd, f.size)

    def _queue(self) -> Iterator[_Piece]:
        """Pieces of all unfinished payloads of this share, in source order."""
        done = self.journal.done if self.journal else set()
        order = []
        for k, f in enumerate(self.files):
            for j, (offset, payload) in enumerate(f.parts):
                if payload.nbytes:
                    order.append((payload.first_span(), k, j, offset, payload))
        order.sort(key=lambda item: item[:3])
        units: dict[object, list[tuple[_Part, Payload]]] = {}  # members of a group go together
        for _, k, j, offset, payload in order:
            key = id(payload.group) if isinstance(payload, Member) else (k, j)
            units.setdefault(key, []).append(((k, j, offset), payload))
        sizes = [sum(p.nbytes for _, p in unit) for unit in units.values()]
        files = [{k for (k, _, _), _ in unit} for unit in units.values()]
        own = self.share.of(list(units.values()), sizes, files)
        self.total = sum(p.nbytes for unit in own for _, p in unit)
        for unit in own:
            unit[:] = [(part, p) for part, p in unit if part[:2] not in done]
            self.left |= {part[:2]: p.nbytes for part, p in unit}
        self.done_bytes = self.total - sum(self.left.values())
        return self._pieces(own)

    def _pieces(self, units: Sequence[Sequence[tuple[_Part, Payload]]]) -> Iterator[_Piece]:
        limit = self.limits.slab()
        for unit in units:
            members = [(p.index, part) for part, p in unit if isinstance(p, Member)]
            if members:
                first = unit[0][1]
                assert isinstance(first, Member), "a unit is one payload or members of one group"
                yield from _joints(first.group, members, limit)
                continue
            for part, payload in unit:
                for slab in payload.slabs(limit):
                    yield slab, [part]

    def _work(self, queue: Iterator[_Piece]) -> None:
        while not self.stop.is_set() and not (self.halted and self.halted()):
            with self.lock:
                item = next(queue, None)
            if item is None:
                return
            slab, parts = item
            if isinstance(slab, Joint):
                for part, (_, at, nbytes), made in zip(
                    parts, slab.places, slab.make(), strict=True
                ):
                    self._put(part, at, nbytes, made)
                continue
            (part,) = parts
            if isinstance(slab, Copy):
                k, j, offset = part
                copy_bytes(slab.source, slab.position, self.fds[k], offset + slab.at, slab.nbytes)
                self._count(k, j, slab.nbytes)
            else:
                self._put(part, slab.at, slab.nbytes, slab.make())

    def _put(self, part: _Part, at: int, nbytes: int, made: np.ndarray | bytes) -> None:
        k, j, offset = part
        pwrite(self.fds[k], _bytes(made, nbytes), offset + at)
        self._count(k, j, nbytes)

    def _count(self, k: int, j: int, nbytes: int) -> None:
        sync = False
        with self.lock:
            self.done_bytes += nbytes
            self.unsynced += nbytes
            self.left[k, j] -= nbytes
            assert self.left[k, j] >= 0, "a payload produced more bytes than it announced"
            if self.left[k, j] == 0:
                self.finished.append((k, j))
                sync = self.journal is not None and self.unsynced >= _SYNC_EVERY
                if sync:
                    self.unsynced = 0
            if self.progress:
                self.progress(self.done_bytes, self.total)
        if sync:
            self._sync()

    def _sync(self) -> None:
        with self.lock:
            finished, self.finished = self.finished, []
        for k in sorted({k for k, _ in finished}):
            os.fsync(self.fds[k])
        if self.journal and finished:
            self.journal.add(finished)


def _joints(
    group: Group, members: Sequence[tuple[int, _Part]], limit: int
) -> Iterator[tuple[Joint, list[_Part]]]:
    """Pieces of a group with the parts they go to, in the order of the places."""
    to = dict(members)
    for joint in group.joints(limit, list(to)):
        yield joint, [to[member] for member, _, _ in joint.places]


def _bytes(made: np.ndarray | bytes, nbytes: int) -> memoryview:
    if isinstance(made, np.ndarray):
        data = np.ascontiguousarray(made).reshape(-1).view(np.uint8).data
    else:
        data = memoryview(made)
    assert data.nbytes == nbytes, f"a slab has {data.nbytes} bytes instead of {nbytes}"
    return data


def output_error(folder: Path, e: OSError) -> OutputError:
    """Turn an OSError of a write into one clear error."""
    if e.errno == errno.ENOSPC:
        return OutputError(f"{folder}: the disk is full; free space and run again with --resume")
    return OutputError(f"{e.filename or folder}: cannot be written ({e.strerror})")
