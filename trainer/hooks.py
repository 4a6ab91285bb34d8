"""What happens around the steps of a run: saving, logging, evaluating, collecting.

The loop knows none of these: it calls every hook, in order, on every rank. A hook that talks to
other ranks must do so on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .batch import DataSource
from .engine import PlainEngine
from .settings import RunConfig
from .state import TrainState

if TYPE_CHECKING:
    from .metrics import StepMetrics


@dataclass(slots=True)
class Run:
    """A run while it runs, as hooks see it."""

    config: RunConfig
    state: TrainState  # model, optimizers, counters
    engine: PlainEngine
    data: DataSource
    stop: bool = False  # set it on all ranks to end after this step

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes logs."""
        return self.state.meshes.world.get_rank() == 0


class Hook:
    """Does nothing; a hook overrides what it needs."""

    def start(self, run: Run) -> None:
        """Before the first step: model and optimizers exist; a resume changes ``run.state``."""

    def step(self, run: Run, metrics: StepMetrics) -> None:
        """After every step; ``run.state.step`` has been counted."""

    def stop(self, run: Run) -> None:
        """After the last step, whether all were done or ``run.stop`` was set."""

    def fail(self, run: Run) -> None:
        """Instead of ``stop`` when an error ends the run; other ranks may be gone already."""
