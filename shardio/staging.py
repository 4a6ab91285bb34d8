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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic

from ..errors import MconvError, OutputError
from .shares import Share
from .source import close_files
from .stream import Journal, Limits, OutFile, Progress, output_error, write_files, write_share
from .team import Team, together

_PLAN = ".mconv-plan"
_JOURNAL = ".mconv-journal"
_FAILED = ".mconv-failed"  # a process of the team left it: the others stop
_LOOK_EVERY = 1.0  # seconds between two looks for it


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

    def finish(folder: Path) -> None:
        old = target.parent / f".{target.name}.mconv-old"
        _remove(old)
        if os.path.lexists(target):
            target.rename(old)
        folder.rename(target)
        _sync_folder(target.parent)
        _remove(old)

    taken = () if force else (target,)
    _staged(target, files, plan, taken, resume, limits or Limits(), progress, finish)


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

    def finish(folder: Path) -> None:
        for f, place in zip(files, places, strict=True):
            (folder / f.name).rename(place)
        folder.rmdir()
        _sync_folder(target.parent)

    taken = () if force else places
    _staged(target, files, plan, taken, resume, limits or Limits(), progress, finish)
    return places


def _staged(
    target: Path,
    files: Sequence[OutFile],
    plan: str,
    taken: Sequence[Path],
    resume: bool,
    limits: Limits,
    progress: Progress | None,
    finish: Callable[[Path], None],
) -> None:
    """Write into the staging folder; ``finish`` moves it into place. ``taken`` must not exist yet.

    Of a team's processes the first one prepares and finishes, each writes its share.
    """
    team, folder = limits.team, staging_folder(target)
    first = team.rank == 0
    with ExitStack() as stack:

        def begin() -> set[tuple[int, int]]:
            if not first:
                return set()
            for place in taken:
                if place.exists():
                    raise OutputError(f"{place} exists; use --force to replace it")
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_space(target, folder, files)
            stack.enter_context(_lock(target))
            return _prepare(folder, plan, resume)

        def end() -> None:
            if first:
                for path in folder.glob(f"{_JOURNAL}*"):
                    path.unlink()
                (folder / _PLAN).unlink()
                _sync_folder(folder)
                finish(folder)
            close_files()  # what was read under a name that now means another file

        try:
            done = _agreed(team, target, plan, together(team, begin))
            journal = Journal(folder / _JOURNAL, done)
            try:
                together(team, lambda: _write(folder, files, limits, journal, progress))
            except OutputError:
                raise  # no space, no permission: a later run may resume
            except MconvError:
                if first:
                    shutil.rmtree(folder)  # bad input: there is nothing to resume
                raise
            together(team, end)
        except OSError as e:
            raise output_error(target, e) from e


def _agreed(
    team: Team, target: Path, plan: str, done: set[tuple[int, int]]
) -> set[tuple[int, int]]:
    """What the first process found finished, once all have planned the same."""
    said = team.gather((plan, done))
    if any(other != said[0][0] for other, _ in said):
        raise OutputError(
            f"{target}: the processes of this run planned different work: they do not see the same "
            "source files, or run different versions"
        )
    found: set[tuple[int, int]] = said[0][1]
    return found


def _write(
    folder: Path,
    files: Sequence[OutFile],
    limits: Limits,
    journal: Journal,
    progress: Progress | None,
) -> None:
    """Write this process's share of the files."""
    team = limits.team
    if team.size == 1:
        write_files(folder, files, limits=limits, journal=journal, progress=progress)
        return
    mark = folder / _FAILED
    look = 0.0

    def halted() -> bool:
        nonlocal look
        now = monotonic()
        if now < look:
            return False
        look = now + _LOOK_EVERY
        return mark.exists()

    share = Share(team.rank, team.size)
    try:
        write_share(
            folder, files, limits, journal.of(team.rank), progress, share=share, halted=halted
        )
    except Exception:
        mark.touch()
        raise


def _prepare(folder: Path, plan: str, resume: bool) -> set[tuple[int, int]]:
    """Make the staging folder, or take up the one of an interrupted run; returns what is done."""
    known = (folder / _PLAN).read_text() if (folder / _PLAN).is_file() else None
    if resume and known == plan:
        (folder / _FAILED).unlink(missing_ok=True)
        return Journal.load(folder / _JOURNAL).done
    if resume and known is not None:
        raise OutputError(
            f"{folder}: the interrupted run had other sources or options; "
            "run without --resume to start over"
        )
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / _PLAN).write_text(plan)
    return set()


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
            f"{target}: needs {need / 1e6:,.1f} MB, only {free / 1e6:,.1f} MB are free on that disk"
        )


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link (not what it leads to), if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
