"""From a configuration and meshes to what a rank trains: parts, optimizers, engine."""

from __future__ import annotations

import torch

from .engine import PlainEngine
from .init import load_weights, materialize, open_weights
from .mesh import TOKENS, Meshes
from .optim import build_optimizers, link, shards
from .parallel import parallelize
from .pipeline import PipelineEngine, build_parts
from .settings import RunConfig
from .state import LossScale, TrainState

_FIRST_SCALE = 2.0**16


def build_state(config: RunConfig, meshes: Meshes, empty: bool = False) -> TrainState:
    """Return the initial state of a rank; every rank calls this.

    ``empty`` leaves parameters on the meta device, without an optimizer (to plan a run).
    """
    dtype = getattr(torch, config.train.dtype)
    with torch.device("meta"):
        parts = build_parts(config, meshes.degrees, meshes.rank("pp"))
    for part in parts:
        part.to(dtype)
        parallelize(part, meshes, config)
    state = TrainState(meshes, parts)
    if empty:
        return state
    for part in parts:
        device = torch.device("cpu") if config.parallel.cpu_offload else meshes.device
        materialize(part, config.train.seed, device)
    if config.model.init_from is not None:
        load_weights(parts, open_weights(config.model.init_from, config.model))
    if config.train.precision == "fp16":
        state.scale = LossScale(_FIRST_SCALE)
    build_optimizer_state(config, state)
    return state


def build_optimizer_state(config: RunConfig, state: TrainState) -> None:
    """Give a state its optimizers and slots; the tied copy of a last stage is updated alike."""
    trained = {n: p for n, p in state.all_parameters() if p.requires_grad}
    state.slots = dict(trained)
    zero1 = config.parallel.zero == 1 and state.meshes.size(*TOKENS) > 1
    if zero1:
        state.slots = shards(trained, state.meshes.replicating())
    state.optimizers = build_optimizers(state.slots, config.optim)
    if zero1:
        link(state.optimizers, trained, state.slots)


def build_engine(config: RunConfig, state: TrainState) -> PlainEngine:
    """Return what runs the state's parts."""
    return (PipelineEngine if state.meshes.degrees.pp > 1 else PlainEngine)(config, state)
