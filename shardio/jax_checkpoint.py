"""A checkpoint of the arrays of a JAX training state, whichever files held them.

The arrays are told apart into weights, moments and the rest by their names (``optax_states``), the
naming by its markers (``jax_worlds``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import FormatError, counted
from .checkpoint import Checkpoint
from .coverage import prove
from .jax_worlds import jax_world_of
from .layout import Layout
from .optax_states import step_of, told_apart
from .registry import OpenOptions
from .state_checkpoint import model_files
from .tensor import LazyTensor


def jax_checkpoint(
    root: Path,
    options: OpenOptions,
    arrays: Mapping[str, LazyTensor],
    *,
    name: str,
    model: str = "",
    step: int | None = None,
) -> Checkpoint:
    """Return the checkpoint of a training state.

    Args:
        root: the file or folder that was opened.
        options: how it was opened.
        arrays: by the keys of the tree joined by dots.
        name: of the format.
        model: the key below which the weights lie, where the format fixes it.
        step: as the format says it; else that of the optimizer's counter.

    Raises:
        FormatError: no weights, or tensors with elements in no or two places.
    """
    weights, optimizer, rest = told_apart(arrays)
    if model:
        rest += [n for n in weights if not n.startswith(f"{model}.")]
        weights = {n: t for n, t in weights.items() if n.startswith(f"{model}.")}
    if not weights:
        where = f"below {model}/" if model else "that could be model weights"
        raise FormatError(f"{root}: holds no arrays {where}")
    prove(weights, root)
    for state, tensors in optimizer.items():
        prove(tensors, f"{root}: optimizer state {state}")
    left = f"left out: {counted(len(rest), 'array')} (counters, schedules, keys): "
    config, assets = model_files(root, options)
    return Checkpoint(
        path=root,
        format=name,
        naming=jax_world_of(weights),
        weights=weights,
        optimizer=optimizer,
        step=step_of(arrays) if step is None else step,
        config=config,
        layout=Layout(format=name),
        assets=assets,
        warnings=(left + rest[0],) if rest else (),
    )
