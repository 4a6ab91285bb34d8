"""Trains the tiny model under ZeRO-3 with its optimizer on "NVMe" and saves it.

    python nvme_training.py OUT

DeepSpeed's own swappers run; only their asynchronous I/O, which needs libaio and a compiler, is
replaced by plain reads and writes of the same bytes. OUT gets ``ckpt/`` and what the live engine
holds, ``truth.npz`` (``fp32/<name>``, ``exp_avg/<name>``, ``exp_avg_sq/<name>``).
"""

from __future__ import annotations

import socket
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tiny_training import batch, forked, groups, make_model, no_compiling

RANKS = 2
SMALLEST = 4096  # bytes of a swapped sub-group; DeepSpeed's is a megabyte


class PlainFiles:
    """The part of DeepSpeed's ``aio_handle`` that its swappers use."""

    def __init__(self, **_: object) -> None:
        self.pinned: set[int] = set()
        self.done = 0

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        """Write a whole buffer."""
        assert offset == 0
        assert buffer.numel() * buffer.element_size() % 1024 == 0
        Path(path).write_bytes(buffer.detach().numpy().tobytes())
        self.done += 1
        return 0

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        """Fill a whole buffer."""
        assert offset == 0
        data = bytearray(Path(path).read_bytes()[: buffer.numel() * buffer.element_size()])
        buffer.data.copy_(torch.frombuffer(data, dtype=buffer.dtype))
        self.done += 1
        return 0

    def wait(self) -> int:
        """How many requests were made since the last call."""
        done, self.done = self.done, 0
        return done

    def new_cpu_locked_tensor(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer for I/O; what it holds at first is written as padding."""
        buffer = torch.full((count,), float("nan"), dtype=like.dtype)
        self.pinned.add(buffer.untyped_storage().data_ptr())
        return buffer

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in such a buffer."""
        return tensor.untyped_storage().data_ptr() in self.pinned

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Buffers are collected."""
        return True


class Op:
    """The module that DeepSpeed would have compiled."""

    aio_handle = PlainFiles


def train(out: Path) -> list[float]:
    """Three steps on one rank, and the save."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import optimizer_utils
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    no_compiling()
    AsyncIOBuilder.load = lambda self, verbose=False: Op
    optimizer_utils.MIN_AIO_BYTES = SMALLEST
    model = make_model(0)
    config = {
        "train_micro_batch_size_per_gpu": 12 // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "aio": {"block_size": SMALLEST, "intra_op_parallelism": 2},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 1500,
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": str(out / "nvme"),
                "buffer_count": 5,
                "pin_memory": False,
            },
        },
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(groups(model), foreach=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(3):
        loss = engine(batch(step, dist.get_rank(), dist.get_world_size()))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(out / "ckpt"))
    truth = {}
    for name, p in engine.module.named_parameters():
        truth[f"fp32/{name}"] = safe_get_full_fp32_param(p).numpy().copy()
        for state in ("exp_avg", "exp_avg_sq"):
            truth[f"{state}/{name}"] = safe_get_full_optimizer_state(p, state).numpy().copy()
    if dist.get_rank() == 0:
        np.savez(out / "truth.npz", **truth)
    return [float(loss)]


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # once, before the ranks are forked

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    forked(RANKS, partial(train, Path(sys.argv[1])), port)
