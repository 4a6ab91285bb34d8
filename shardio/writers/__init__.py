"""Writers: one module per target layout; each has a ``WRITER`` and is found by discovery.

A writer turns a checkpoint (in the names it asks for) and a layout into a list of planned output
files; nothing is read or written here. ``shardio/staging.py`` then writes them all or not at all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...errors import ConfigError, did_you_mean
from ..checkpoint import Checkpoint
from ..layout import Layout
from ..stream import OutFile


@dataclass(frozen=True, slots=True)
class Planned:
    """What a writer wants written.

    Attributes:
        files: every file of the output folder.
        warnings: what could not be carried, in plain words.
    """

    files: tuple[OutFile, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Writer:
    """One target layout.

    Attributes:
        name: what ``--to`` and ``Layout.format`` call it.
        title: for people.
        naming: the names it writes (``hf``, ``megatron``); the checkpoint is brought into them.
        plan: from checkpoint and layout to files. Optimizer states are written when the checkpoint
            has them. Raises LayoutError for a layout that cannot hold the model.
        ordered: it numbers weights, so they must come in the order in which the model registers
            them.
        resumes: it is written to train on: optimizer states go along unless told otherwise.
        keeps: a source that has its names already keeps them, instead of going through those of
            Hugging Face.
        instead: the name of the writer for a source and layout, where it is another one.
    """

    name: str
    title: str
    naming: str
    plan: Callable[[Checkpoint, Layout], Planned]
    resumes: bool = True
    ordered: bool = False
    keeps: bool = False
    instead: Callable[[Checkpoint, Layout], str | None] = lambda ckpt, layout: None


@lru_cache(maxsize=1)
def writers() -> Mapping[str, Writer]:
    """All writers by name."""
    found: dict[str, Writer] = {}
    for module in pkgutil.iter_modules(__path__):
        writer = getattr(importlib.import_module(f"{__name__}.{module.name}"), "WRITER", None)
        if isinstance(writer, Writer):
            found[writer.name] = writer
    return found


def get_writer(name: str, also: Sequence[str] = ()) -> Writer:
    """Return the writer of that name.

    Args:
        name: what ``--to`` says.
        also: further targets that the caller knows.

    Raises:
        ConfigError: with the closest known name.
    """
    writer = writers().get(name)
    if writer is None:
        known = [*writers(), *also]
        raise ConfigError(
            f"cannot write format {name!r}{did_you_mean(name, known)}; "
            f"targets: {', '.join(sorted(known))}"
        )
    return writer


def writer_for(ckpt: Checkpoint, layout: Layout, also: Sequence[str] = ()) -> Writer:
    """Return the writer of a layout for a source.

    Raises:
        ConfigError: with the closest known name.
    """
    writer = get_writer(layout.format, also)
    other = writer.instead(ckpt, layout)
    return writer if other is None else get_writer(other)
