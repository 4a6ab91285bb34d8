"""Read a whole checkpoint and say everything that is wrong with it.

Coverage first (no bytes needed), then in the order of the files: checksums of a file where its
format has them, and each tensor slab by slab: NaN and infinity, stored copies that must be equal,
and fp32 masters that must round to the weights. A tensor and its copies are read once; the bytes
that a checksum covers are read again at once, while the system still caches them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np

from ..errors import MconvError
from . import dtypes
from .agreement import differing, disagreement
from .box import Box, extent
from .cast import caster
from .checkpoint import Checkpoint
from .checksums import Checksum, archive_checksums, mismatch
from .coverage import Flaw, flaws
from .flat_buffer import Deferred
from .payload import first_span, row_slabs
from .stream import Progress
from .tensor import LazyTensor
from .tensor_stats import count_nonfinite, first_nonfinite

_SLAB = 1 << 20  # elements of a tensor in memory at once, per thread
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Verification:
    """What a full check found.

    Attributes:
        nbytes: bytes of tensors that were read (checksummed bytes not counted twice).
        checked: what was compared, and how often: ``tensors``, ``copies``, ``masters``,
            ``checksums``.
        problems: everything that is wrong; empty when the checkpoint is sound.
        notes: what could not be checked, in plain words.
    """

    nbytes: int
    checked: Mapping[str, int]
    problems: tuple[Flaw, ...]
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Job:
    """Something to be read: ``place`` orders the jobs, ``run`` returns what is wrong and tells how
    many bytes it has read.
    """

    place: tuple[str, int]
    name: str
    nbytes: int
    run: Callable[[Tick], list[Flaw]]


def verify_checkpoint(ckpt: Checkpoint, progress: Progress | None = None) -> Verification:
    """Check every byte of a checkpoint. Memory stays below about 20 MiB for each of 4 threads.

    Args:
        ckpt: an opened checkpoint.
        progress: called with (bytes done, bytes in all).
    """
    bad = flaws(ckpt.weights)
    for state, tensors in ckpt.optimizer.items():
        bad += flaws({f"{state}.{n}": t for n, t in tensors.items()})
    broken = {flaw.name for flaw in bad}
    jobs, sums, checked = _jobs(ckpt, broken)
    meter = _Meter(progress, sum(job.nbytes for job in jobs))

    def run(job: _Job) -> list[Flaw]:
        try:
            return job.run(meter.add)
        except (MconvError, OSError) as e:
            return [Flaw(job.name, str(e))]

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        found = [flaw for part in pool.map(run, jobs) for flaw in part]
    return Verification(
        nbytes=meter.total - sum(c.nbytes for c in sums),
        checked={k: n for k, n in checked.items() if n},
        problems=(*bad, *found),
        notes=_notes(ckpt, checked),
    )


def _jobs(ckpt: Checkpoint, broken: set[str]) -> tuple[list[_Job], list[Checksum], Counter[str]]:
    """Return (jobs in file order, checksums, counts)."""
    jobs: list[_Job] = []
    checked: Counter[str] = Counter()
    masters = ckpt.optimizer.get("master", {})
    for name, weight in ckpt.weights.items():
        if name in broken:
            continue
        copies = ckpt.replicas.get(name, ())
        master = masters.get(name)
        if master is weight or f"master.{name}" in broken or not dtypes.is_float(weight.dtype):
            master = None
        nbytes = (
            weight.nbytes
            + sum(c.nbytes for c in copies)
            + (master.nbytes if master is not None else 0)
        )
        run = _Tensor(name, weight, copies, master).flaws
        jobs.append(_Job(_place(weight), name, nbytes, run))
        checked.update(tensors=1, copies=len(copies), masters=master is not None)
    for state, tensors in ckpt.optimizer.items():
        for name, tensor in tensors.items():
            full = f"{state}.{name}"
            if full in broken or (state == "master" and name in ckpt.weights):
                continue
            run = _Tensor(full, tensor).flaws
            jobs.append(_Job(_place(tensor), full, tensor.nbytes, run))
            checked["tensors"] += 1
    sums = _checksums(ckpt, jobs)
    by_file: dict[Path, list[Checksum]] = {}
    for c in sums:
        by_file.setdefault(c.path, []).append(c)
    for path, part in by_file.items():
        nbytes = sum(c.nbytes for c in part)
        jobs.append(_Job((str(path), -1), path.name, nbytes, partial(_sums, part)))
    checked["checksums"] = len(sums)
    return sorted(jobs, key=lambda j: j.place), sums, checked


def _place(tensor: LazyTensor) -> tuple[str, int]:
    """Where a tensor begins; for those without a list of pieces yet, the file alone."""
    if any(isinstance(leaf, Deferred) for leaf in tensor.leaves()):
        files = tensor.files()
        return (str(files[0]), 0) if files else ("", 0)
    return first_span(tensor)


def _checksums(ckpt: Checkpoint, jobs: list[_Job]) -> list[Checksum]:
    """Those of the index, and those of the archives that hold tensors; damaged archives become
    jobs that fail.
    """
    groups = (ckpt.weights, *ckpt.optimizer.values(), dict(_copies(ckpt)))
    lists = {id(f): f for g in groups for t in g.values() if (f := t.files())}
    paths = {path for files in lists.values() for path in files}
    found = list(ckpt.checksums)
    for path in sorted(paths):
        if not path.is_file():  # a tensor that was computed
            continue
        try:
            found += archive_checksums(path)
        except MconvError as e:
            jobs.append(
                _Job((str(path), -1), path.name, 0, partial(_fixed, str(path.name), str(e)))
            )
    return found


def _copies(ckpt: Checkpoint) -> Iterator[tuple[str, LazyTensor]]:
    for name, copies in ckpt.replicas.items():
        for k, copy in enumerate(copies):
            yield f"{name} {k}", copy


def _fixed(name: str, problem: str, tick: Tick) -> list[Flaw]:
    return [Flaw(name, problem)]


def _sums(checksums: Sequence[Checksum], tick: Tick) -> list[Flaw]:
    found = []
    for c in checksums:
        if (problem := mismatch(c)) is not None:
            found.append(Flaw(c.name, problem))
        tick(c.nbytes)
    return found


def _notes(ckpt: Checkpoint, checked: Mapping[str, int]) -> tuple[str, ...]:
    notes = []
    if not checked["checksums"]:
        notes.append(
            "the files keep no checksums: a changed byte that is still a number is not seen"
        )
    if not checked["copies"]:
        notes.append("no tensor is stored twice, so there are no copies to compare")
    if "master" in ckpt.optimizer and not checked["masters"]:
        notes.append("the fp32 masters are the weights themselves, there is nothing to compare")
    return tuple(notes)


class _Tensor:
    """One tensor, its copies and its master, read together."""

    def __init__(
        self,
        name: str,
        tensor: LazyTensor,
        copies: Sequence[LazyTensor] = (),
        master: LazyTensor | None = None,
    ) -> None:
        self.name, self.tensor, self.copies, self.master = name, tensor, copies, master

    def flaws(self, tick: Tick) -> list[Flaw]:
        """Read everything once."""
        tensor, master, found = self.tensor, self.master, []
        if master is not None and master.shape != tensor.shape:
            found.append(f"the fp32 master has shape {master.shape}, the weight {tensor.shape}")
            master = None
        values, wide = _Values(), _Values()
        unequal = {k for k, c in enumerate(self.copies) if c.shape != tensor.shape}
        other = _Unequal()
        for box, _ in row_slabs(tensor.shape, _SLAB):
            here = _read(tensor, box)
            values.add(here, box)
            for k, copy in enumerate(self.copies):
                if k not in unequal and not _same(here, _read(copy, box)):
                    unequal.add(k)
            if master is not None:
                fp32 = _read(master, box)
                wide.add(fp32, box)
                other.add(differing(caster(master.dtype, tensor.dtype)(fp32), here), box)
                tick(fp32.nbytes)
            tick(here.nbytes * (1 + len(self.copies)))
        found += [self._copy(k) for k in sorted(unequal)]
        for read in (self.tensor, *self.copies, *([] if self.master is None else [self.master])):
            for leaf in read.leaves():
                if isinstance(leaf, Deferred):
                    leaf.forget()
        if other.count:
            found.append(disagreement(other.count, tensor.size, other.first, tensor.dtype))
        flaws = [Flaw(self.name, p) for p in (*values.problems(), *found)]
        return flaws + [Flaw(f"master.{self.name}", p) for p in wide.problems()]

    def _copy(self, number: int) -> str:
        here, there = (first_span(t)[0] for t in (self.tensor, self.copies[number]))
        return f"the copy in {there} differs from the one in {here}"


class _Values:
    """Counts of values that are no numbers."""

    def __init__(self) -> None:
        self.nan = self.inf = 0
        self.first: tuple[int, ...] | None = None

    def add(self, values: np.ndarray, box: Box) -> None:
        nan, inf = count_nonfinite(values)
        if (nan or inf) and self.first is None:
            place = first_nonfinite(values)
            self.first = tuple(a + b for a, b in zip(place, box[0], strict=True))
        self.nan += nan
        self.inf += inf

    def problems(self) -> list[str]:
        if self.first is None:
            return []
        counts = [f"{n} {what}" for n, what in ((self.nan, "NaN"), (self.inf, "infinite")) if n]
        return [f"{' and '.join(counts)} values, first at {list(self.first)}"]


class _Unequal:
    """Elements that differ, and where the first is."""

    def __init__(self) -> None:
        self.count = 0
        self.first: tuple[int, ...] = ()

    def add(self, bad: np.ndarray, box: Box) -> None:
        count = int(np.count_nonzero(bad))
        if count and not self.count:
            self.first = tuple(int(a) + b for a, b in zip(np.argwhere(bad)[0], box[0], strict=True))
        self.count += count


class _Meter:
    """Progress over threads."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self.total = progress, total
        self._lock, self._done = Lock(), 0

    def add(self, nbytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self.total)


def _read(tensor: LazyTensor, box: Box) -> np.ndarray:
    out = np.empty(extent(box), tensor.dtype)
    tensor.fill(out, box)
    return out


def _same(x: np.ndarray, y: np.ndarray) -> bool:
    return x.dtype == y.dtype and bool(
        np.array_equal(x.reshape(-1).view(np.uint8), y.reshape(-1).view(np.uint8))
    )
