"""Writing with several processes of one machine: each forked one makes its share of the plan.

The plan is made once, before the fork, so that the children share its memory; they send nothing
back but the bytes they have finished, their peak memory and how they ended. Used where threads are
held up by Python itself: encoding many small pieces, casts, permutations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

from ..errors import MconvError, OutputError
from .shares import Share
from .stream import Journal, Limits, OutFile, Progress, write_share
from .team import HaltedError
from .usage import Peak, own_peak, tell

_TELL_EVERY = 0.2  # seconds


def write_in_processes(
    folder: Path,
    files: Sequence[OutFile],
    limits: Limits,
    journal: Journal | None,
    progress: Progress | None,
) -> None:
    """Write the files with ``limits.processes`` forked processes.

    Raises:
        MconvError: what a process met; the others have stopped.
        OutputError: a process was killed.
    """
    context = get_context("fork")
    stop = context.Event()
    part, size = limits.part(), limits.processes
    pipes: dict[Connection, int] = {}
    children = []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        own = None if journal is None else journal.of(rank)
        arguments = (theirs, folder, files, part, own, Share(rank, size), stop.is_set)
        child = context.Process(target=_main, args=arguments, daemon=True)
        child.start()
        theirs.close()
        pipes[mine] = rank
        children.append(child)
    try:
        errors = _listen(pipes, stop.set, progress)
    finally:
        stop.set()
        for child in children:
            child.join()
    if errors:  # what failed by itself, before those that were stopped by it
        raise min(errors, key=lambda e: isinstance(e, HaltedError))


def _listen(
    pipes: dict[Connection, int], stop: Callable[[], None], progress: Progress | None
) -> list[MconvError]:
    """Add up progress until all processes have ended; returns their errors."""
    state = dict.fromkeys(pipes.values(), (0, 0))
    errors: list[MconvError] = []
    while pipes:
        for pipe in wait(list(pipes)):
            assert isinstance(pipe, Connection)
            try:
                said = pipe.recv()
            except EOFError:
                said = OutputError(
                    f"worker process {pipes[pipe]} was killed (out of memory?); run again with "
                    "--resume"
                )
            if isinstance(said, tuple):
                state[pipes[pipe]] = said
                if progress:
                    progress(sum(d for d, _ in state.values()), sum(t for _, t in state.values()))
                continue
            if isinstance(said, Peak):
                tell(said)
                continue
            if said is not None:
                errors.append(said)
                stop()
            del pipes[pipe]
            pipe.close()
    return errors


def _reporter(pipe: Connection) -> Progress:
    """Tells the parent how far this process is, a few times a second."""
    told = 0.0

    def report(done: int, total: int) -> None:
        nonlocal told
        if monotonic() > told + _TELL_EVERY or done == total:
            told = monotonic()
            pipe.send((done, total))

    return report


def _main(pipe: Connection, *arguments: Any) -> None:
    """A worker process."""
    folder, files, limits, journal, share, halted = arguments
    said: MconvError | None = None
    try:
        write_share(
            folder,
            files,
            limits,
            journal,
            _reporter(pipe),
            share=share,
            halted=halted,
        )
    except MconvError as e:
        said = e
    except Exception as e:  # a bug of ours must reach the parent as such
        said = MconvError(f"worker process {share.rank}: {type(e).__name__}: {e}")
    pipe.send(own_peak())
    pipe.send(said)
    pipe.close()
