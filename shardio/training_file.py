"""``training_state.json``: what formats that hold tensors only cannot say about an optimizer.

Written beside optimizer states in safetensors form, so that a checkpoint that passes through such a
folder can still be trained on: steps, hyper-parameters by weight names, schedules, loss scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .assets import load_json
from .checkpoint import Checkpoint
from .safetensors_plan import plan_json
from .stored import is_whole
from .stream import OutFile

FILE = "training_state.json"
_VERSION = 1


def plan_training_file(ckpt: Checkpoint) -> OutFile:
    """Plan the file: everything the checkpoint knows that is plain data."""
    scalars = {k: v for k, v in ckpt.scalars.items() if is_whole(v)}
    content: dict[str, Any] = {"version": _VERSION, "step": ckpt.step, "scalars": scalars}
    for key in ("training_dtype", "buffer_names"):
        if ckpt.args.get(key) is not None:
            content[key] = ckpt.args[key]
    return plan_json(FILE, content)


def read_training_file(folder: Path) -> tuple[int | None, dict[str, Any], dict[str, Any]]:
    """Return (step, scalars, args) of the file in ``folder``; empty without one.

    Raises:
        ConfigError: the file is malformed.
    """
    path = folder / FILE
    if not path.is_file():
        return None, {}, {}
    content = load_json(path)
    if not isinstance(content, Mapping):
        return None, {}, {}
    step, scalars = content.get("step"), content.get("scalars")
    args = {k: content[k] for k in ("training_dtype", "buffer_names") if k in content}
    return (
        step if type(step) is int and step >= 0 else None,
        dict(scalars) if isinstance(scalars, Mapping) else {},
        args,
    )
