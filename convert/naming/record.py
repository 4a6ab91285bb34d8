"""What a naming module provides: how to get from its checkpoints to a table, sizes and a config.

A module of this folder with a ``NAMING`` describes one foreign world. ``Checkpoint.naming`` holds
its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...shardio.checkpoint import Checkpoint
from .table import Table
from .transforms import Sizes


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller says.

    Attributes:
        vocab_size: true vocabulary size, where the foreign embedding is padded.
        padded_vocab_size: rows of the foreign embedding to be made (None: no padding).
        model_type: Hugging Face model type, where the checkpoint does not tell.
    """

    vocab_size: int | None = None
    padded_vocab_size: int | None = None
    model_type: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """One model between two worlds.

    Attributes:
        table: names and transforms.
        sizes: parameters of the transforms.
        config: Hugging Face config.json.
        args: settings in the foreign world.
        left_out: prefixes of foreign names that Hugging Face has no place for.
        warnings: what a user should know.
    """

    table: Table
    sizes: Sizes
    config: Mapping[str, Any]
    args: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Naming:
    """A foreign world.

    Attributes:
        name: as in ``Checkpoint.naming``.
        title: for people.
        describe: a checkpoint with foreign names to its model. Raises ConfigError.
        plan: a checkpoint with Hugging Face names and config to the model to be made of it.
            Raises ConfigError.
        restore: brings a checkpoint into Hugging Face names by itself, where it can; None: it
            cannot, use the table.
    """

    name: str
    title: str
    describe: Callable[[Checkpoint, Request], Model]
    plan: Callable[[Checkpoint, Request], Model]
    restore: Callable[[Checkpoint, Request], Checkpoint | None] = lambda ckpt, request: None
