"""What a rank trains: its parts of the model, their optimizers, and counters.

This is what checkpoints save. Parameters are found by name: a name is that of the Hugging Face
tensor (experts: that of ``moe.py``'s stack), the same on every rank and under every layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .mesh import Meshes
from .optim import owners_of

if TYPE_CHECKING:
    from .model import Decoder

HEAD = "lm_head.weight"


@dataclass(slots=True)
class LossScale:
    """The factor that keeps float16 gradients from vanishing; 1 for every other precision."""

    value: float = 1.0
    good: int = 0  # steps since it last changed

    def update(self, finite: bool) -> None:
        """Halve after an overflow, double after 2000 good steps (as torch's GradScaler)."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good == 2000:
            self.value, self.good = self.value * 2, 0


@dataclass(slots=True)
class TrainState:
    """A rank's share of a run."""

    meshes: Meshes
    parts: list[Decoder]  # pipeline stages, in the order of their layers; one without a pipeline
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    # what optimizers keep states of, by parameter name: the trained parameter itself, or with
    # ZeRO 1 this rank's shard of it
    slots: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0  # optimizer steps done
    tokens: int = 0  # labels counted so far
    scale: LossScale = field(default_factory=LossScale)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters by name.

        Values are ``DTensor`` where they are sharded. The copy of a tied embedding that the last
        pipeline stage has is not among them; a tied head is one entry, the embedding's.
        """
        return {name: p for name, p in self.all_parameters() if name != HEAD or not self._tied}

    def all_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters with the tied copy, if this rank has it."""
        for part in self.parts:
            yield from part.named_parameters()

    def tied_copy(self) -> nn.Parameter | None:
        """Return the last stage's copy of a tied embedding, if it is one and this rank's."""
        if not self._tied:
            return None
        return next((p for name, p in self.all_parameters() if name == HEAD), None)

    @property
    def _tied(self) -> bool:
        return self.parts[0].config.tie_word_embeddings

    def optimizer_states(self) -> dict[str, dict[str, Tensor]]:
        """Return the live optimizer states (``exp_avg``, ...) by parameter; empty at first."""
        owners = owners_of(self.optimizers)
        return {name: owners[id(slot)].state[slot] for name, slot in self.slots.items()}
