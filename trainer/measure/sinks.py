"""Further takers of a run's numbers: TensorBoard and Weights & Biases, where installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from ...errors import ConfigError

if TYPE_CHECKING:
    from ..settings import RunConfig

#: Takes the numbers of a step under their names.
Sink = Callable[[int, Mapping[str, float]], None]


def sinks(config: RunConfig) -> tuple[Sink, ...]:
    """Return the takers that ``log.to`` names.

    Raises:
        ConfigError: one of them is not installed.
    """
    made = {"tensorboard": _tensorboard, "wandb": _wandb}
    return tuple(made[name](config) for name in config.log.to)


def _tensorboard(config: RunConfig) -> Sink:
    with _installed("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(config.save.folder / "tensorboard"))

    def put(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return put


def _wandb(config: RunConfig) -> Sink:
    with _installed("wandb"):
        import wandb
    settings = json.loads(json.dumps(asdict(config), default=str))
    run = wandb.init(project="mconv", dir=str(config.save.folder), config=settings)
    return lambda step, numbers: run.log(dict(numbers), step=step)


@contextmanager
def _installed(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"log.to names {name}, which is not installed: pip install {name}"
        ) from error
