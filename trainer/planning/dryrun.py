"""What a run would look like: layout, parameters and bytes per rank, without any of the ranks.

Each pipeline rank's parts are built on the meta device under a fake process group, cut exactly as
in the run; nothing is allocated and no device is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..build import build_state
from ..init import local_part
from ..mesh import EXPERT_FSDP, FSDP, TOKENS, build_meshes
from ..moe import expert_names
from ..optim import shards
from ..settings import RunConfig
from ..settings.degrees import Degrees, resolve
from ..state import TrainState


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank of a pipeline stage has."""

    layers: tuple[tuple[int, ...], ...]  # of its stages
    parameters: int  # of its shards
    parameter_bytes: int
    gradient_bytes: int  # at the end of backward
    optimizer_bytes: int
    gathered_bytes: int  # parameters that are whole for a while, on top

    @property
    def total_bytes(self) -> int:
        """All of these; activations come on top."""
        held = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        return held + self.gathered_bytes


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run before it starts."""

    degrees: Degrees
    parameters: int  # of the whole model
    ranks: tuple[RankPlan, ...]  # one per pipeline rank
    tokens_per_step: int  # over all ranks
    checkpoint_bytes: int  # of weights and optimizer states


def plan_run(config: RunConfig, world_size: int) -> RunPlan:
    """Return the plan of a run on ``world_size`` processes; no process group may exist.

    Raises:
        ConfigError: the layout is impossible.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    degrees = resolve(config, world_size)
    ranks, whole, state_bytes = [], 0, 0
    for stage in range(degrees.pp):
        rank = stage * (world_size // degrees.pp)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            state = build_state(config, build_meshes(degrees, "cpu"), empty=True)
            ranks.append(_rank_plan(config, state))
            for parameter in state.parameters().values():
                whole += parameter.numel()
                moments = _moments(config, parameter.shape) if parameter.requires_grad else 0
                state_bytes += parameter.numel() * parameter.itemsize * (1 + moments)
        finally:
            dist.destroy_process_group()
    tokens = config.train.batch * config.train.seq_len
    return RunPlan(degrees, whole, tuple(ranks), tokens, state_bytes)


def _rank_plan(config: RunConfig, state: TrainState) -> RankPlan:
    zero = config.parallel.zero
    shared = state.meshes.size(*TOKENS) > 1
    half = 2 if config.train.precision != "full" else 0
    named = dict(state.all_parameters())
    trained = {n: p for n, p in named.items() if p.requires_grad}
    slots = shards(trained, state.meshes.replicating()) if zero == 1 and shared else trained
    layers: dict[str, int] = {}
    for name, parameter in named.items():
        over = EXPERT_FSDP if expert_names(config.model, name) else FSDP
        size = local_part(parameter).numel() * (state.meshes.size(*over) if zero > 1 else 1)
        unit = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else ""
        layers[unit] = layers.get(unit, 0) + size * (half or parameter.itemsize)
    gathered = 0
    if (shared and zero > 1) or half:
        rest = {unit: size for unit, size in layers.items() if unit}
        inner = max(rest.values()) if zero == 3 and rest else sum(rest.values())
        gathered = layers.get("", 0) + inner
    return RankPlan(
        tuple(tuple(int(n) for n in part.model.layers) for part in state.parts),
        sum(local_part(p).numel() for p in named.values()),
        sum(local_part(p).numel() * p.itemsize for p in named.values()),
        sum(local_part(p).numel() * p.itemsize for p in trained.values()),
        sum(local_part(p).numel() * p.itemsize * _moments(config, p.shape) for p in slots.values()),
        gathered,
    )


def _moments(config: RunConfig, shape: torch.Size) -> int:
    """Return how many values of optimizer state a parameter's element has, about."""
    return 1 if config.optim.name == "muon" and len(shape) == 2 else 2
