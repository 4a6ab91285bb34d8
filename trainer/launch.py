"""Starting the ranks of a run on this machine and watching them; being a rank of ``torchrun``.

Each rank is ``python -m mconv.trainer RUN.toml``; what it prints goes to ``rank-N.log`` in the
run's folder. When one rank fails the others are ended, since they would wait for it forever. An
interrupt or a termination signal goes to all ranks, which save and end. They do the same when the
launcher is killed: their standard input, which only it holds open, then ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TrainError
from .settings import RunConfig

_POLL = 0.1
_GRACE = 5.0
_LOOPBACKS = ("lo", "lo0")


def launch(
    run: Path,
    folder: Path,
    processes: int,
    on_poll: Callable[[], None] | None = None,
    settings: Sequence[str] = (),
) -> None:
    """Train the run of a TOML file with ``processes`` ranks and wait for the end.

    Args:
        run, settings: as ``load_config`` takes them.
        folder: the run's folder, for the logs.
        processes: number of ranks.
        on_poll: called about ten times a second while the ranks run.

    Raises:
        ConfigError: fewer than one process.
        TrainError: a rank failed; the message holds the end of its log.
    """
    if processes < 1:
        raise ConfigError(f"cannot train with {processes} processes; use 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        meeting = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mconv-"))) / "store"
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, ranks)
        stack.enter_context(_passing_signals(ranks))
        for rank in range(processes):
            place = [str(run.resolve()), str(meeting), str(rank), str(processes)]
            log = stack.enter_context(_log(folder, rank).open("wb"))
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", f"{__package__}", *place, *settings],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=folder,  # so that a file of the user's folder never shadows a package
                    start_new_session=True,  # a Ctrl-C comes to them once, from here
                )
            )
        _watch(ranks, folder, on_poll)


def torchrun_rank() -> tuple[int, int] | None:
    """Return rank and number of processes if ``torchrun`` started this one."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def end_with_the_launcher() -> None:
    """Ask this rank to save and end, as a termination signal does, once its launcher is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def run_rank(config: RunConfig, rank: int, world_size: int, store: Path | None = None) -> None:
    """Train as one rank of a run, which meets the others through ``store`` or as torchrun says.

    Raises:
        MconvError: the configuration or the data cannot be used.
    """
    from .loop import train
    from .mesh import build_meshes, choose_device, process_group, set_threads
    from .settings.degrees import resolve

    degrees = resolve(config, world_size)
    here = world_size if store else int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if here == world_size:
        prefer_loopback()
    set_threads(config.train.threads, here)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    device = choose_device(config.train.device)
    with process_group(rank, world_size, store, device):
        train(config, build_meshes(degrees, device))


def prefer_loopback() -> None:
    """Let gloo connect over the loopback interface: all ranks are here.

    Its own choice is the interface of the host name's address, which a VPN or a missing entry in
    the hosts file leads astray.
    """
    for _, name in socket.if_nameindex():
        if name in _LOOPBACKS:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


@contextmanager
def _passing_signals(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass interrupts and terminations on to the ranks, as terminations; they decide what to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(*_: Any) -> None:
        for process in ranks:
            if process.poll() is None:
                process.terminate()

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        assert process.stdin is not None, "launched with a pipe"
        process.stdin.close()


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"
