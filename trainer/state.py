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

if TYPE_CHECKING:
    from .model import Decoder

HEAD = "lm_head.weight"


@dataclass(slots=True)
class LossScale:
    """The factor that keeps float16 gradients from vanishing; 1 for every other precision.

    Attributes:
        value: the factor now.
        good: steps since it last changed.
    """

    value: float = 1.0
    good: int = 0

    def update(self, finite: bool) -> None:
        """Halve after an overflow, double after 2000 good steps (as torch's GradScaler)."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good == 2000:
            self.value, self.good = self.value * 2, 0


@dataclass(slots=True)
class TrainState:
    """A rank's share of a run.

    Attributes:
        meshes: of the run.
        parts: this rank's pipeline stages, in the order of their layers; one without a pipeline.
        optimizers: each has some of the tensors of ``slots``.
        slots: parameter name to the tensor whose state an optimizer keeps: the parameter itself,
            or with ZeRO-1 this rank's shard of it. Parameters that are not trained have none.
        step: optimizer steps done.
        tokens: labels counted so far.
        scale: of float16.
    """

    meshes: Meshes
    parts: list[Decoder]
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    slots: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    tokens: int = 0
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

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        """Return the live optimizer state of a parameter (``exp_avg``, ...); empty before the first
        step, and filled by loading a checkpoint into it."""
        slot = self.slots[name]
        for optimizer in self.optimizers:
            if any(slot is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state[slot]
        return {}
