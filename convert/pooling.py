"""How the folder of a sentence-transformers model pools token embeddings into one.

Source: ``modules.json`` and the ``config.json`` of its Pooling module, as sentence-transformers
writes them; the numbers are llama.cpp's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedError

_TYPES = {"mean": 1, "cls": 2, "lasttoken": 3}
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}


def sentence_pooling(folder: Path) -> int | None:
    """Return llama.cpp's number of the pooling; None when the folder says nothing.

    Raises:
        ConfigError: a file is missing or damaged.
        UnsupportedError: a pooling that llama.cpp does not know.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = _load(folder / "modules.json")
    listed = modules if isinstance(modules, list) else []
    for module in listed:
        if isinstance(module, Mapping) and str(module.get("type", "")).endswith("Pooling"):
            path = folder / str(module.get("path")) / "config.json"
            return _number(path, _load(path))
    return None


def _number(path: Path, settings: Any) -> int:
    if isinstance(settings, Mapping):
        for flag, kind in _FLAGS.items():
            if settings.get(flag):
                return _TYPES[kind]
        if settings.get("pooling_mode") in _TYPES:
            return _TYPES[settings["pooling_mode"]]
    raise UnsupportedError(f"{path}: pools neither by mean, nor the first or last token")


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot be read ({e})") from e
