"""Process groups and device meshes.

One mesh has all ranks, by (pp, dp_replicate, dp_mod, ep, cp, tp); dimensions of size 1 are left
out. ``dp_mod`` and ``ep`` together are ``dp_shard``. Everything else is a flattened part of it:
the batch is cut over ``DP``, parameters over ``FSDP``, experts over ``ep`` and ``EXPERT_FSDP``,
tokens over ``TOKENS``.

Ranks that ``mconv`` starts on one machine meet through a file, which needs no network, no port and
no environment variables; ranks of ``torchrun`` as it says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .settings.degrees import Degrees

DP = ("dp_replicate", "dp_mod", "ep")
FSDP = ("dp_mod", "ep", "cp")
EXPERT_FSDP = ("dp_mod", "cp")
TOKENS = (*DP, "cp")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Meshes:
    """The mesh of all ranks and its parts."""

    degrees: Degrees
    world: DeviceMesh
    _made: dict[str, DeviceMesh] = field(default_factory=dict)

    def size(self, *names: str) -> int:
        """Return the number of ranks along dimensions."""
        return prod(getattr(self.degrees, name) for name in names)

    def sub(self, *names: str) -> DeviceMesh:
        """Return the one-dimensional mesh of this rank along dimensions.

        Every rank must ask for the same ones in the same order. Of ``pp``, ``cp``, ``tp`` and
        ``ep`` there is none where the degree is 1.
        """
        there = [n for n in names if n in (self.world.mesh_dim_names or ())]
        key = "_".join(there)
        if key not in self._made:
            mesh = self.world[tuple(there)] if len(there) > 1 else self.world[there[0]]
            self._made[key] = mesh._flatten(key) if len(there) > 1 else mesh
        return self._made[key]

    def group(self, *names: str) -> dist.ProcessGroup | None:
        """Return the process group along dimensions; None when this rank is alone in it."""
        return self.sub(*names).get_group() if self.size(*names) > 1 else None

    def rank(self, *names: str) -> int:
        """Return where this rank is along dimensions."""
        return self.sub(*names).get_local_rank() if self.size(*names) > 1 else 0

    def union(self, mine: dict[str, T]) -> dict[str, T]:
        """Return what the pipeline ranks have by name, on all ranks; every rank calls this.

        What ranks of a stage have must be the same: one of them speaks.
        """
        speaks = all(self.rank(n) == 0 for n in ("dp_replicate", "dp_mod", "ep", "cp", "tp"))
        everyone: list[dict[str, T]] = [{}] * self.world.size()
        dist.all_gather_object(everyone, mine if speaks else {})
        return {name: value for one in everyone for name, value in one.items()}

    def replicating(self) -> set[str]:
        """Return the names of the mesh dimensions over which ZeRO 0 and 1 keep copies."""
        meshes = self.sub("dp_replicate", *FSDP), self.sub("dp_replicate", *EXPERT_FSDP)
        return {name for mesh in meshes for name in mesh.mesh_dim_names or ()}

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        if self.world.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.world.device_type)


def build_meshes(degrees: Degrees, device_type: str) -> Meshes:
    """Return the meshes of a layout; the process group exists, every rank calls this."""
    order = ("pp", "dp_replicate", "dp_mod", "ep", "cp", "tp")
    names = tuple(n for n in order if getattr(degrees, n) > 1 or n == "dp_mod")
    shape = tuple(getattr(degrees, n) for n in names)
    meshes = Meshes(degrees, init_device_mesh(device_type, shape, mesh_dim_names=names))
    for parts in (DP, FSDP, EXPERT_FSDP, TOKENS):
        meshes.sub(*parts)  # groups are made now, by all ranks in the same order
    return meshes


def choose_device(wish: str) -> str:
    """Return ``cpu`` or ``cuda``; ``auto`` takes CUDA where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if wish == "auto" else wish


@contextmanager
def process_group(
    rank: int, world_size: int, store: Path | None = None, device_type: str = "cpu"
) -> Iterator[None]:
    """Join the other ranks, and leave them at the end.

    Args:
        rank: of this process.
        world_size: number of processes.
        store: a file that did not exist before the first rank came; None: as the environment says.
        device_type: ``cuda`` computes on this machine's GPU number ``LOCAL_RANK`` and has gloo
            for tensors in CPU memory.
    """
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    place: dict[str, Any] = {"init_method": f"file://{store}" if store else "env://"}
    if not store and (attempt := _attempt(world_size)) is not None:
        place = {"store": attempt}
    dist.init_process_group(backend, rank=rank, world_size=world_size, **place)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _attempt(world_size: int) -> Store | None:
    """Return this attempt's part of the store that torchrun shares with its ranks, if it does.

    The store outlives ranks that died, and gloo would connect to their addresses. Agents of several
    machines count restarts apart, so those need ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``.
    """
    env = os.environ
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or env.get("LOCAL_WORLD_SIZE") != str(world_size):
        return None
    store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world_size, is_master=False)
    return PrefixStore(f"attempt-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def set_threads(threads: int, world_size: int) -> None:
    """Use ``threads`` CPU threads in this process; 0: its share of the machine's cores."""
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // world_size))
