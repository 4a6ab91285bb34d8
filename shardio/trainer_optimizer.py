"""``optimizer.pt`` of the Hugging Face Trainer, ``optimizer.bin`` of accelerate: beside the model.

The optimizer's own ``state_dict()``: its states are numbered in the order in which the model
registers its parameters, per group (the Trainer makes two: with and without weight decay). The
model's files tell that order (``.bin``), or its names do; shapes must agree with every state.
Source: transformers ``trainer.py`` (``create_optimizer``), accelerate ``checkpointing.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MconvError
from .hf_order import by_registration
from .state_checkpoint import optimizer_of
from .state_tree import examine
from .tensor import LazyTensor
from .torchfile import open_torch_file

FILES = ("optimizer.pt", "optimizer.bin")


def read_trainer_optimizer(
    folder: Path,
    weights: Mapping[str, LazyTensor],
    tied: Mapping[str, str],
    ordered: bool,
    step: int | None,
    notes: list[str],
) -> tuple[dict[str, dict[str, LazyTensor]], Mapping[str, Any]]:
    """Return (states by weight name, scalars); both empty where there are none to be named.

    Args:
        folder: of the model.
        weights: of the model.
        tied: alias to owner.
        ordered: whether ``weights`` are in the model's own order.
        step: what the trainer noted; states of another step are told.
        notes: what a user should know is added here, also why an optimizer is left out.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        return {}, {}
    try:
        tree = examine({"optimizer": open_torch_file(path).root})
    except MconvError as e:
        notes.append(f"the optimizer is left out: {e}")
        return {}, {}
    names = list(weights) if ordered else by_registration(weights)
    if names is None:
        notes.append(
            f"{path.name} is left out: it numbers its states, and the order in which this model "
            "registers its parameters is not known"
        )
        return {}, {}
    states, scalars, taken = optimizer_of(tree, {n: weights[n] for n in names}, tied, notes)
    if states and step is not None and taken is not None and taken != step:
        notes.append(
            f"{path.name} is of step {taken}, the model of step {step}: files of two saves were "
            "mixed, or steps were skipped for loss scaling"
        )
    return states, scalars
