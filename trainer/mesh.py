"""Process groups and device meshes.

Ranks on one machine meet through a file , which needs no network, no port and no
environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@contextmanager
def process_group(rank: int, world_size: int, store: Path) -> Iterator[DeviceMesh]:
    """Join the ranks that share ``store`` and yield their one-dimensional mesh ``dp_shard``.

    Args:
        rank: of this process.
        world_size: number of processes.
        store: a file that did not exist before the first rank came.
    """
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp_shard",))
    finally:
        dist.destroy_process_group()


def set_threads(threads: int, world_size: int) -> None:
    """Use ``threads`` CPU threads in this process; 0: its share of the machine's cores."""
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // world_size))


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one CPU thread for a while: on tiny matrices several are slower, on a busy CPU much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
