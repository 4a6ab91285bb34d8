"""What a checkpoint holds of a rank's training state, and the way back.

Saving names everything by Hugging Face's tensors; loading reads this rank's regions, and nothing
else, out of any checkpoint that ``shardio`` opens: the run's own under another layout, or one of
another framework.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from .init import load_weights, read_into, source_name
from .moe import expert_names
from .optim import PEAK, owners_of
from .shards import Piece, pieces_of
from .state import TrainState

OWN_FILE = "trainer.json"
_VERSION = 1
_KINDS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def content_of(state: TrainState, own: Mapping[str, Any], files: Mapping[str, bytes]) -> Content:
    """Return what this rank has to save; every rank calls this.

    Args:
        state: the rank's.
        own: the trainer's further settings, for ``trainer.json``.
        files: name to contents of further files.
    """
    config, saved = state.parts[0].config, state.parameters()
    weights = [piece for name, p in saved.items() for piece in pieces_of(name, p, config)]
    states: list[Piece] = []
    updates = state.step
    for name, found in state.optimizer_states().items():
        for kind, value in found.items() if name in saved else ():
            if kind == "step":
                updates = int(value)
            elif isinstance(value, Tensor):
                states += [
                    replace(piece, name=f"optim.state.{piece.name}.{kind}")
                    for piece in pieces_of(name, value, config)
                ]
    groups = [{**group, "step": updates} for group in _groups(state)]
    if state.meshes.world.get_rank() != 0:
        return Content(weights, states)
    training = {"version": 1, "step": state.step, "scalars": {"param_groups": groups}}
    mine = {
        "version": _VERSION,
        "step": state.step,
        "tokens": state.tokens,
        "loss_scale": [state.scale.value, state.scale.good],
        "layout": str(state.meshes.degrees),
        **own,
    }
    made = {TRAINING_FILE: as_json(training), OWN_FILE: as_json(mine)}
    return Content(weights, states, {**files, **made})


def as_json(value: object) -> bytes:
    """Return the contents of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def read_own(folder: Path) -> dict[str, Any]:
    """Return ``trainer.json``; empty where another program wrote the checkpoint."""
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

    Raises:
        ConfigError: tensors are missing or of another shape.
    """
    wide = next(p for _, p in state.all_parameters()).dtype in (torch.float32, torch.float64)
    masters = ckpt.optimizer.get("master", {}) if wide else {}
    load_weights(state.parts, replace(ckpt, weights={**ckpt.weights, **masters}), adapters=True)


def load_optimizer(state: TrainState, ckpt: Checkpoint, step: int) -> None:
    """Fill this rank's optimizer states from ``ckpt``, which has Hugging Face names.

    ``step`` says how many updates were done, for Adam's bias correction.

    Raises:
        ConfigError: moments are missing or of another shape.
    """
    part = state.parts[0]
    owners = owners_of(state.optimizers)
    for name, slot in state.slots.items():
        optimizer = owners[id(slot)]
        for kind in _KINDS[type(optimizer)]:
            value = torch.zeros_like(slot).requires_grad_(False)
            if kind not in ckpt.optimizer:
                raise ConfigError(
                    f"{ckpt.path}: no optimizer state {kind}, which optim.name asks for (there is "
                    f"{', '.join(ckpt.optimizer) or 'none'}); go on with the optimizer it was "
                    "trained with, or start from its weights with model.init_from"
                )
            found = ckpt.optimizer[kind]
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


def _groups(state: TrainState) -> list[dict[str, Any]]:
    """Return the optimizers' groups over all ranks, with the names of their parameters.

    The tied copy of a last stage is left out: its states are those of the embedding.
    """
    config, saved = state.parts[0].config, state.parameters()
    names = {id(slot): n for n, slot in state.slots.items() if n in saved}
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
            whole = [n for name in held for n in expert_names(config, name) or [name]]
            mine.append((json.dumps(plain, sort_keys=True), whole))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    merged: dict[str, dict[str, None]] = {}
    for ranks in everyone:
        for text, held in ranks:
            merged.setdefault(text, {}).update(dict.fromkeys(held))
    return [{**json.loads(text), "params": list(held)} for text, held in merged.items()]
