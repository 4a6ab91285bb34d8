"""Saving and loading: torch's distributed checkpoint (DCP), made usable by itself.

Every save is a folder ``step-00000100`` with the sharded weights and optimizer states (keyed by
parameter name), ``config.json`` and the tokenizer beside them. It is written under a hidden name
and renamed when complete, so a folder with the final name is whole.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict

from ..errors import ConfigError
from .model import Decoder
from .model_config import ModelConfig


def step_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` lies in a run's folder."""
    return run / f"step-{step:08d}"


def save(
    run: Path,
    step: int,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    assets: Path,
    special: dict[str, int],
) -> Path:
    """Write a checkpoint; every rank calls this.

    Args:
        run: the run's folder.
        step: steps done.
        model, optimizer: sharded.
        assets: folder whose files (the tokenizer's) go beside the weights.
        special: token ids for ``config.json``, such as ``bos_token_id``.

    Returns:
        The finished folder, on all ranks.
    """
    final = step_folder(run, step)
    part = final.with_name(f".{final.name}.tmp")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    weights, states = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": weights, "optimizer": states}, checkpoint_id=part)
    if first:
        config = model.config.to_hf(**special, dtype=str(_dtype(model)).removeprefix("torch."))
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in sorted(p for p in assets.iterdir() if p.is_file()):
            shutil.copyfile(path, part / path.name)
        part.replace(final)
    dist.barrier()
    return final


def load_model(folder: Path) -> Decoder:
    """Return the model of a checkpoint on one process, read by torch's own DCP reader.

    Raises:
        ConfigError: no ``config.json``, or not of a model that the trainer has.
    """
    path = folder / "config.json"
    try:
        config = ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    model = Decoder(config)
    state = {"model": model.state_dict()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        state_dict_loader.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state["model"])
    return model.eval()


def _dtype(model: Decoder) -> torch.dtype:
    return next(model.parameters()).dtype
