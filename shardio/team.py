"""Several processes on one job: who they are, and how they agree before and after the work.

Nothing but small values crosses between them; the bytes go through the shared file system.
``Alone`` is the usual team of one. ``torch_team`` joins the processes that ``torchrun`` started, on
one or several machines; torch is imported only there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Protocol, TypeVar

from ..errors import MconvError, OutputError

T = TypeVar("T")
_PATIENCE = timedelta(days=30)  # one rank may write for a day while another is done


class HaltedError(OutputError):
    """This process stopped because another one failed."""


class Team(Protocol):
    """The processes of one job."""

    @property
    def rank(self) -> int:
        """This process, counted from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Wait for all; returns everyone's value in rank order.

        Raises:
            OutputError: a process is gone.
        """
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """A team of one."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """The value itself."""
        return [value]


ALONE = Alone()


@dataclass(frozen=True, slots=True)
class _TorchTeam:
    """Ranks of ``torch.distributed``."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Over gloo."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value)
        except RuntimeError as e:
            raise OutputError(
                "another process of this run is gone; see its message, and run again with --resume"
            ) from e
        return found


def torch_team() -> Team:
    """Join the other processes of ``torchrun`` (it sets RANK, WORLD_SIZE, MASTER_ADDR).

    Raises:
        OutputError: torch is missing, or the others do not come.
    """
    try:
        import torch.distributed as dist
    except ImportError as e:
        raise OutputError("running under torchrun needs torch; --workers 1 runs alone") from e
    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as e:
        raise OutputError(
            f"the processes of torchrun do not find each other ({e}); --workers 1 runs alone"
        ) from e
    return _TorchTeam(dist.get_rank(), dist.get_world_size())


def together(team: Team, work: Callable[[], T]) -> T:
    """Do a piece of work on every process; if it fails on one, it fails on all.

    Raises:
        MconvError: this process's own error, else an OutputError that names the other's.
    """
    if team.size == 1:
        return work()
    result: T
    own: Exception | None = None
    try:
        result = work()
    except Exception as e:  # told to the others first, then raised again
        own = e
    halted = isinstance(own, HaltedError)
    said = team.gather(None if own is None else (halted, isinstance(own, OutputError), str(own)))
    if own is not None and not halted:
        raise own
    failed = sorted((*what, rank) for rank, what in enumerate(said) if what is not None)
    if failed:
        _, resumable, text, rank = failed[0]
        kind = OutputError if resumable else MconvError
        raise kind(f"rank {rank} of {team.size}: {text}")
    return result


def of_torchrun() -> bool:
    """Whether this process has joined others that ``torchrun`` started."""
    dist: Any = sys.modules.get("torch.distributed")
    return "TORCHELASTIC_RUN_ID" in os.environ and dist is not None and dist.is_initialized()


def leave(status: int) -> NoReturn:
    """End the process of a rank at once.

    Now and then gloo's threads abort the interpreter when it takes its modules down.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
