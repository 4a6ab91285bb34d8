"""What a checkpoint holds of a rank's training state, and the way back.

Saving names everything by Hugging Face's tensors; loading reads this rank's regions, and nothing
else, out of any checkpoint that ``shardio`` opens: the run's own under another layout, or one of
another framework.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from ..shardio.checkpoint import Checkpoint
from ..shardio.training_file import FILE as TRAINING_FILE
from .checkpoint import Content
from .init import source_name
from .optim import PEAK
from .pieces import Piece, pieces_of, whole_names
from .state import TrainState
from .weights import read_into

OWN_FILE = "trainer.json"
_VERSION = 1
_MASTER = "master"
_KINDS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def content_of(
    state: TrainState,
    own: Mapping[str, Any],
    texts: Mapping[str, str],
    copies: tuple[Path, ...] = (),
) -> Content:
    """Return what this rank has to save; every rank calls this.

    Args:
        state: the rank's.
        own: the trainer's further settings, for ``trainer.json``.
        texts, copies: further files.
    """
    config = state.parts[0].config
    weights = [
        piece for name, p in state.parameters().items() for piece in pieces_of(name, p, config)
    ]
    states: list[Piece] = []
    steps: set[int] = set()
    for name in _trained(state):
        for kind, value in state.optimizer_state(name).items():
            if kind == "step":
                steps.add(int(value))
            elif isinstance(value, Tensor):
                states += [
                    replace(piece, name=f"optim.state.{piece.name}.{kind}")
                    for piece in pieces_of(name, value, config)
                ]
    first = state.meshes.world.get_rank() == 0
    groups = _groups(state)
    if first:
        step = max(steps, default=state.step)
        groups = [{**g, "step": step} for g in groups]
        training = {"version": 1, "step": state.step, "scalars": {"param_groups": groups}}
        mine = {
            "version": _VERSION,
            "step": state.step,
            "tokens": state.tokens,
            "loss_scale": [state.scale.value, state.scale.good],
            "layout": str(state.meshes.degrees),
            **own,
        }
        texts = {
            **texts,
            TRAINING_FILE: json.dumps(training, indent=1) + "\n",
            OWN_FILE: json.dumps(mine, indent=1) + "\n",
        }
    return Content(weights, states, texts if first else {}, copies if first else ())


def read_own(folder: Path) -> dict[str, Any]:
    """Return ``trainer.json``; empty where another program wrote the checkpoint.

    Raises:
        ConfigError: it is unreadable.
    """
    path = folder / OWN_FILE
    if not path.is_file():
        return {}
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if not isinstance(own, dict) or own.get("version") != _VERSION:
        raise ConfigError(f"{path}: is of another version of mconv")
    return own


def load_parameters(state: TrainState, ckpt: Checkpoint) -> None:
    """Fill this rank's parameters, adapters too; fp32 masters where the parameters can hold them.

    Args:
        state: of the rank.
        ckpt: with Hugging Face names.

    Raises:
        ConfigError: tensors are missing or of another shape.
    """
    weights = dict(ckpt.weights)
    if _dtype(state) in (torch.float32, torch.float64):
        weights |= ckpt.optimizer.get(_MASTER, {})
    weights |= {alias: weights[owner] for alias, owner in ckpt.tied.items() if owner in weights}
    for part in state.parts:
        for name, parameter in part.named_parameters():
            read_into(parameter, source_name(part, name), part.config, weights, ckpt.path)


def load_optimizer(state: TrainState, ckpt: Checkpoint, step: int) -> None:
    """Fill this rank's optimizer states.

    Args:
        state: whose optimizers have not stepped yet.
        ckpt: with Hugging Face names, and the moments of every trained parameter.
        step: updates done so far, for Adam's bias correction.

    Raises:
        ConfigError: moments are missing or of another shape.
    """
    part = state.parts[0]
    owners = {
        id(p): optimizer
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, slot in state.slots.items():
        optimizer = owners[id(slot)]
        for kind in _KINDS[type(optimizer)]:
            value = torch.zeros_like(slot).requires_grad_(False)
            found = ckpt.optimizer.get(kind, {})
            try:
                read_into(value, source_name(part, name), part.config, found, ckpt.path)
            except ConfigError as error:
                raise ConfigError(
                    f"{error} (optimizer state {kind}); to start from the weights alone use "
                    "model.init_from"
                ) from error
            optimizer.state[slot][kind] = value
        if isinstance(optimizer, torch.optim.AdamW):
            fused = optimizer.param_groups[0]["fused"]
            device = slot.device if fused else torch.device("cpu")
            optimizer.state[slot]["step"] = torch.tensor(float(step), device=device)


# -- details ---------------------------------------------------------------------------------------


def _trained(state: TrainState) -> Iterable[str]:
    """Names whose states are saved: the tied copy's are those of the embedding."""
    known = state.parameters()
    return (name for name in state.slots if name in known)


def _groups(state: TrainState) -> list[dict[str, Any]]:
    """Return the optimizers' groups over all ranks, with the names of their parameters."""
    config = state.parts[0].config
    names = {id(slot): n for n, slot in state.slots.items() if n in set(_trained(state))}
    mine: list[tuple[str, list[str]]] = []
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            plain = {
                k: list(v) if isinstance(v, tuple) else v
                for k, v in group.items()
                if isinstance(v, (int, float, str, bool, tuple)) and k != PEAK
            }
            plain["optimizer"] = type(optimizer).__name__
            held = [names[id(p)] for p in group["params"] if id(p) in names]
            whole = whole_names(held, config)
            text = json.dumps(plain, sort_keys=True)
            mine.append((text, [n for name in held for n in whole[name]]))
    everyone: list[Any] = [None] * state.meshes.world.size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    else:
        everyone = [mine]
    merged: dict[str, dict[str, None]] = {}
    for ranks in everyone:
        for text, held in ranks:
            merged.setdefault(text, {}).update(dict.fromkeys(held))
    return [{**json.loads(text), "params": list(held)} for text, held in merged.items()]


def _dtype(state: TrainState) -> torch.dtype:
    return next(p for _, p in state.all_parameters()).dtype
