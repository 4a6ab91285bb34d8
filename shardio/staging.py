"""Atomic output: everything is written into a hidden folder beside the target and renamed at the
end.

A crash, a full disk or ``kill -9`` leaves either the old target or nothing, plus the hidden folder,
from which ``resume`` continues when the plan (outputs and the identity of every source file) is
still the same. Two runs on one target at a time are refused by a lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import MconvError, OutputError
from .source import close_files
from .stream import Journal, Limits, OutFile, Progress, output_error, write_files

_PLAN = ".mconv-plan"
_JOURNAL = ".mconv-journal"


def staging_folder(target: Path) -> Path:
    """The hidden folder that a run for ``target`` writes into."""
    return target.parent / f".{target.name}.mconv-part"


def fingerprint(files: Sequence[OutFile], sources: Iterable[Path], options: str) -> str:
    """Digest of what is to be written and from what: same digest, same output bytes."""
    digest = hashlib.sha256(options.encode())
    for f in files:
        digest.update(f"{f.name}\0{f.size}\0{len(f.parts)}\0".encode())
        for offset, payload in f.parts:
            digest.update(f"{offset}\0{payload.nbytes}\0{payload.first_span()}\n".encode())
    for path in sorted(set(sources)):
        if path.exists():
            stat = path.stat()
            digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def write_folder(
    target: Path,
    files: Sequence[OutFile],
    *,
    plan: str,
    sources: Iterable[Path] = (),
    force: bool = False,
    resume: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> None:
    """Write ``files`` as the folder ``target``, all or nothing.

    Args:
        target: the output folder; must not exist unless ``force``.
        files: what to write.
        plan: fingerprint of the work.
        sources: files that are read; a target that holds one is never replaced.
        force: replace an existing target (after the new one is complete).
        resume: continue an interrupted run of the same plan.
        limits: memory and threads.
        progress: called with (bytes done, bytes in all).

    Raises:
        OutputError: target exists, no space, no permission, or nothing that fits to resume.
    """
    place = target.resolve()
    own = next((p for p in sources if p.resolve().is_relative_to(place)), None)
    if own is not None:
        raise OutputError(f"{target}: holds the source {own}; choose another output folder")
    with _staged(target, files, plan, force, resume, limits, progress) as folder:
        old = target.parent / f".{target.name}.mconv-old"
        if old.exists():
            shutil.rmtree(old)
        if target.exists():
            target.rename(old)
        folder.rename(target)
        _sync_folder(target.parent)
        if old.exists():
            shutil.rmtree(old)


def write_loose(
    target: Path,
    files: Sequence[OutFile],
    *,
    plan: str,
    force: bool = False,
    resume: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``files`` beside ``target`` (a GGUF, or its shards), each renamed into place when all
    are complete.

    Args:
        target: names the run and the folder the files go to; other arguments as ``write_folder``.

    Returns:
        The paths written.

    Raises:
        OutputError: as ``write_folder``.
    """
    places = [target.parent / f.name for f in files]
    taken = [p for p in places if p.exists()]
    if taken and not force:
        raise OutputError(f"{taken[0]} exists; use --force to replace it")
    with _staged(target, files, plan, True, resume, limits, progress) as folder:
        for f, place in zip(files, places, strict=True):
            (folder / f.name).rename(place)
        folder.rmdir()
        _sync_folder(target.parent)
    return places


@contextmanager
def _staged(
    target: Path,
    files: Sequence[OutFile],
    plan: str,
    force: bool,
    resume: bool,
    limits: Limits | None,
    progress: Progress | None,
) -> Iterator[Path]:
    """Write into the staging folder; the caller moves it into place inside the ``with``."""
    if target.exists() and not force:
        raise OutputError(f"{target} exists; use --force to replace it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = staging_folder(target)
        _check_space(target, folder, files)
        with _lock(target):
            journal = _prepare(folder, plan, resume)
            try:
                write_files(folder, files, limits=limits, journal=journal, progress=progress)
            except OutputError:
                raise  # no space, no permission: a later run may resume
            except MconvError:
                shutil.rmtree(folder)  # bad input: there is nothing to resume
                raise
            (folder / _JOURNAL).unlink(missing_ok=True)
            (folder / _PLAN).unlink()
            _sync_folder(folder)
            yield folder
            close_files()  # what was read under a name that now means another file
    except OSError as e:
        raise output_error(target, e) from e


def _prepare(folder: Path, plan: str, resume: bool) -> Journal:
    """Make the staging folder, or take up the one of an interrupted run."""
    known = (folder / _PLAN).read_text() if (folder / _PLAN).is_file() else None
    if resume and known == plan:
        return Journal.load(folder / _JOURNAL)
    if resume and known is not None:
        raise OutputError(
            f"{folder}: the interrupted run had other sources or options; "
            "run without --resume to start over"
        )
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / _PLAN).write_text(plan)
    return Journal(folder / _JOURNAL)


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    path = target.parent / f".{target.name}.mconv-lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{target}: another mconv is writing it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _check_space(target: Path, folder: Path, files: Sequence[OutFile]) -> None:
    need = sum(f.size for f in files)
    for f in files:  # what an interrupted run already holds
        part = folder / f.name
        if part.exists():
            need -= part.stat().st_blocks * 512
    free = shutil.disk_usage(target.parent).free
    if need > free:
        raise OutputError(
            f"{target}: needs {need / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free on that disk"
        )


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
