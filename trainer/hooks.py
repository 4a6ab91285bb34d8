"""What happens around the steps of a run: saving, logging, evaluating, collecting.

The loop knows none of these: it calls every hook, in order, on every rank. A hook that talks to
other ranks must do so on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .batch import Batch, DataSource
from .config import RunConfig
from .state import TrainState

if TYPE_CHECKING:
    from .metrics import StepMetrics


class Engine(Protocol):
    """Runs the model forward and backward, whatever the layout (``engine.py``)."""

    def train(self, batch: Batch) -> tuple[Tensor, int]:
        """Accumulate the gradients of a whole step's rows of this rank.

        Returns:
            The step's loss per counted label, and how many labels counted, over all ranks.
        """
        ...

    def evaluate(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the same of a batch, without gradients."""
        ...


@dataclass(slots=True)
class Run:
    """A run while it runs, as hooks see it.

    Attributes:
        config: its configuration.
        state: model, optimizers, counters.
        engine: for evaluation.
        data: what it trains on.
        stop: set it on all ranks to end after this step.
    """

    config: RunConfig
    state: TrainState
    engine: Engine
    data: DataSource
    stop: bool = False

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
