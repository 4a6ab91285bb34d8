"""Starting the ranks of a run on this machine and watching them.

Each rank is ``python -m mconv.trainer RUN.toml``; what it prints goes to ``rank-N.log`` in the
run's folder. When one rank fails the others are ended, since they would wait for it forever.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..errors import ConfigError, TrainError

_POLL = 0.1
_GRACE = 5.0


def launch(
    run: Path, folder: Path, processes: int, on_poll: Callable[[], None] | None = None
) -> None:
    """Train the run of a TOML file with ``processes`` ranks and wait for the end.

    Args:
        run: the TOML file.
        folder: the run's folder, for the logs.
        processes: number of ranks.
        on_poll: called about ten times a second while the ranks run.

    Raises:
        ConfigError: fewer than one process.
        TrainError: a rank failed; the message holds the end of its log.
    """
    if processes < 1:
        raise ConfigError(f"cannot train with {processes} processes; use 1 or more")
    with ExitStack() as stack:
        meeting = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mconv-"))) / "store"
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, ranks)
        for rank in range(processes):
            command = [sys.executable, "-m", f"{__package__}", str(run.resolve()), str(meeting)]
            log = stack.enter_context(_log(folder, rank).open("wb"))
            ranks.append(
                subprocess.Popen(
                    [*command, str(rank), str(processes)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=folder,  # so that a file of the user's folder never shadows a package
                )
            )
        _watch(ranks, folder, on_poll)


def _watch(
    ranks: Sequence[subprocess.Popen[bytes]], folder: Path, on_poll: Callable[[], None] | None
) -> None:
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                path = _log(folder, rank)
                lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                last = lines[-1] if lines else "no output"
                raise TrainError(f"rank {rank} ended with status {code}: {last} (log: {path})")
        if on_poll:
            on_poll()
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs, and leave no zombie."""
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    for process in ranks:
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"
