"""Inputs of the merge benchmark:

the same kind of tensors as DCP, as ZeRO-3 files and as per-rank files.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

ROWS, COLS, WORLD = 4096, 5120, 4


def make_dcp(folder: Path, count: int) -> Path:
    """Write a DCP checkpoint with torch on 4 gloo processes: half Shard(0), half Shard(1)."""
    import torch.multiprocessing as mp

    mp.spawn(_dcp_rank, (str(folder), count), nprocs=WORLD)
    return folder


def _dcp_rank(rank: int, folder: str, count: int) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    dist.init_process_group(
        "gloo", store=dist.FileStore(folder + ".store", WORLD), rank=rank, world_size=WORLD
    )
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (WORLD,))
    state = {
        name: DTensor.from_local(local, mesh, [Shard(dim)])
        for name, local, dim in _locals(rank, count)
    }
    dcp.save({"model": state}, checkpoint_id=folder)
    dist.destroy_process_group()


def _locals(rank: int, count: int):  # type: ignore[no-untyped-def]
    import torch

    for k in range(count):
        dim = k % 2
        shape = [ROWS, COLS]
        shape[dim] //= WORLD
        generator = torch.Generator().manual_seed(k * WORLD + rank)
        local = torch.randn(shape, generator=generator).to(torch.bfloat16)
        yield f"layers.{k}.weight", local, dim


def make_ranks(folder: Path, count: int) -> Path:
    """Write plain per-rank state dicts."""
    import torch

    folder.mkdir()
    for rank in range(WORLD):
        state = {name: local for name, local, _ in _locals(rank, count)}
        torch.save(state, folder / f"rank{rank}.pt")
    return folder


def make_zero3(folder: Path, count: int) -> Path:
    """Write ZeRO-3 files as DeepSpeed 0.19 lays them out (zero_to_fp32 reads them too)."""
    import torch

    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    shapes = OrderedDict((f"layers.{k}.weight", torch.Size((ROWS, COLS))) for k in range(count))
    for rank in range(WORLD):
        generator = torch.Generator().manual_seed(rank)
        flat = torch.randn(count * ROWS * COLS // WORLD, generator=generator)
        common = {"ds_config": {}, "ds_version": "0.19.8"}
        optim = {
            "zero_stage": 3,
            "loss_scaler": None,
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": WORLD,
            "optimizer_state_dict": {"state": {}, "param_groups": [{"params": [0], "lr": 1e-4}]},
            "fp32_flat_groups": [flat],
        }
        torch.save(
            {"optimizer_state_dict": optim, **common},
            tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        model = {
            "module": {name: torch.empty(0, dtype=torch.bfloat16) for name in shapes},
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [shapes],
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "shared_params": {},
            "lr_scheduler": None,
            "dp_world_size": WORLD,
            "mp_world_size": 1,
            "global_steps": 1,
            "global_samples": 4,
            "skipped_steps": 0,
            **common,
        }
        torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return folder
