"""Errors about a model's configuration name the file it came from.

What reads the settings of an architecture knows their content only, and says ``config.json:``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import MconvError
from ..shardio import Checkpoint
from ..shardio.assets import CONFIG, config_path

_SAID = f"{CONFIG}: "


@contextmanager
def config_named(ckpt: Checkpoint) -> Iterator[None]:
    """Put the path of the checkpoint's configuration into errors about it."""
    try:
        yield
    except MconvError as error:
        path, text = config_path(ckpt.assets), str(error)
        if path is None or not text.startswith(_SAID):
            raise
        raise type(error)(f"{path}: {text.removeprefix(_SAID)}") from error
