"""DeepSpeed universal checkpoints: ``zero/<parameter>/fp32.pt`` and its neighbours.

Such a folder also holds copies of ordinary model files, so this format goes first. Source:
github.com/deepspeedai/DeepSpeed, ``deepspeed/checkpoint/ds_to_universal.py``.
"""

from __future__ import annotations

from pathlib import Path

from ..deepspeed.folder import latest
from ..deepspeed.universal import FORMAT as NAME
from ..deepspeed.universal import is_universal, open_universal
from ..registry import Format


def detect(path: Path) -> Path | None:
    """The tag folder, from itself, its ``zero`` folder, a file of a parameter, or the save folder
    whose ``latest_universal`` names it.
    """
    named = latest(path, "latest_universal") if path.is_dir() else None
    if named is not None and is_universal(path / named):
        return path / named
    for place in (path, path.parent, path.parent.parent.parent):
        if place.is_dir() and (place == path or "zero" in path.parts[-3:]) and is_universal(place):
            return place
    return None


FORMAT = Format(name=NAME, title="DeepSpeed universal", detect=detect, open=open_universal, rank=25)
