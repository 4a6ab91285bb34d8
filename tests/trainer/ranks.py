"""Ranks for tests: processes forked from one that has imported everything and computed nothing.

A fork takes a second where a fresh interpreter takes ten. It must not come from pytest itself:
autograd refuses to run in a child of a process that has used it. So a server is started once per
session; it forks the ranks of each job, which meet through a file.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Ranks:
    """Runs functions of test modules on several ranks."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 120,
    ) -> list[Any]:
        """Call ``function(rank, world_size, store, *args)`` on every rank; return what they return.

        A job in which a rank aborts (gloo, once in a while on a busy machine) is run once more.
        """
        path = sys.modules[function.__module__].__file__
        job = pickle.dumps((path, function.__name__, world_size, args, timeout))
        for last in (False, True):
            pickle.dump(job, self._server.stdin)
            self._server.stdin.flush()
            results, error = pickle.load(self._server.stdout)
            if error is None:
                return results
            if last or "SIGABRT" not in error:
                raise AssertionError(error)
            sys.stderr.write(f"run once more: {error}\n")
        raise AssertionError

    def close(self) -> None:
        """End the server."""
        self._server.stdin.close()
        self._server.wait(10)


def _serve() -> None:
    import torch
    import torch.distributed.pipelining
    from mconv.trainer import build, loop  # noqa: F401  # ready for the ranks
    from mconv.trainer.delivery import demo  # noqa: F401

    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_run(job), out)
        out.flush()


def _run(job: bytes) -> tuple[list[Any], str | None]:
    path, name, world_size, args, timeout = pickle.loads(job)
    with tempfile.TemporaryDirectory(prefix="mconv-ranks-") as folder:
        pids = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _rank(Path(folder), path, name, rank, world_size, args)
            pids.append(pid)
        error = _wait(pids, timeout)
        results = []
        for rank in range(world_size):
            file = Path(folder) / f"result-{rank}"
            ok, value = pickle.loads(file.read_bytes()) if file.exists() else (False, "no result")
            if not ok:
                error = f"rank {rank}: {value}" + (f" ({error})" if error else "")
            results.append(value)
        return results, error


def _rank(folder: Path, path: str, name: str, rank: int, world: int, args: tuple[Any, ...]) -> None:
    """Be a rank, and end the process."""
    try:
        module = _module(path)
        value: tuple[bool, Any] = (
            True,
            getattr(module, name)(rank, world, folder / "store", *args),
        )
    except BaseException:
        value = (False, traceback.format_exc())
    part = folder / f"part-{rank}"
    part.write_bytes(pickle.dumps(value))
    part.rename(folder / f"result-{rank}")
    sys.stderr.flush()
    os._exit(0 if value[0] else 1)


def _module(path: str) -> Any:
    """Import a test module by its file, as ``tests.trainer.NAME`` so that it finds its siblings."""
    root = Path(__file__).resolve().parents[2]
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    name = ".".join(Path(path).resolve().relative_to(root).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _wait(pids: list[int], timeout: float) -> str | None:
    """Wait for all; when one fails or time is up, end the others."""
    deadline, left, error = time.monotonic() + timeout, set(pids), None
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                if os.WIFSIGNALED(status) and error is None:
                    error = f"a rank died of {signal.Signals(os.WTERMSIG(status)).name}"
                    deadline = min(deadline, time.monotonic() + 3)
                elif status and error is None:
                    error = "a rank failed"
                    deadline = min(deadline, time.monotonic() + 3)
        if time.monotonic() > deadline:
            error = error or f"no end after {timeout} s"
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return error
        time.sleep(0.01)
    return error


if __name__ == "__main__":
    _serve()
