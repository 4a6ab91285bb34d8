"""Trains the tiny model under whichever DeepSpeed is first on the path, once per ZeRO stage.

    python version_training.py OUT CASE...

Each case gets ``OUT/CASE/ckpt`` and what the live engine holds, ``OUT/CASE/truth.npz`` (``fp32``,
``exp_avg``, ``exp_avg_sq``, ``frozen`` and ``weight``, each ``/<name>``).
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tiny_training import ADAM, batch, forked, make_model, no_compiling

RANKS, STEPS, FROZEN = 2, 2, "layers.1.mlp"
CASES: dict[str, dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "bf16-optimizer": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero2": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "zero3": {
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 2000,
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": True},
    },
}


def train(case: str, out: Path) -> list[float]:
    """Two steps on one rank, the save, and the truth."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    no_compiling()
    get_accelerator().device_count = lambda: RANKS  # old releases ask numactl
    model = make_model(0, tied=True)
    for name, p in model.named_parameters():
        p.requires_grad = FROZEN not in name
    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 12 // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        **CASES[case],
    }
    optimizer = torch.optim.AdamW([{"params": trained, **ADAM}], foreach=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        loss = engine(batch(step, dist.get_rank(), dist.get_world_size()))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(out / "ckpt"))
    truth = {}
    for name, p in engine.module.named_parameters():
        if case != "zero3":
            truth[f"weight/{name}"] = p.detach().float().numpy().copy()
        if p.requires_grad:
            found = _plain(engine, p) if case == "zero0" else _of_engine(p)
            truth |= {f"{kind}/{name}": t.float().numpy().copy() for kind, t in found.items()}
        else:
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                truth[f"frozen/{name}"] = p.detach().float().numpy().copy()
    if dist.get_rank() == 0:
        np.savez(out / "truth.npz", **truth)
    return [float(loss)]


def _of_engine(p: torch.Tensor) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = {s: safe_get_full_optimizer_state(p, s) for s in ("exp_avg", "exp_avg_sq")}
    found = {"fp32": safe_get_full_fp32_param(p), **states}
    return {k: t for k, t in found.items() if t is not None}  # 0.17's getters find nothing here


def _plain(engine: Any, p: torch.Tensor) -> dict[str, torch.Tensor]:
    state = engine.optimizer.state[p]
    return {"fp32": p.detach(), **{s: state[s] for s in ("exp_avg", "exp_avg_sq")}}


def _on_views(gather: Callable[..., Any]) -> Callable[..., Any]:
    """Releases before 0.19 gather into views that a new torch does not let be written to."""

    def into(output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return gather(output_tensor.data, *args, **kwargs)

    return into


def main() -> None:
    """Train the cases one after the other."""
    dist.all_gather_into_tensor = _on_views(dist.all_gather_into_tensor)
    import deepspeed  # noqa: F401  # once, before the ranks are forked

    for case in sys.argv[2:]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = int(s.getsockname()[1])
        out = Path(sys.argv[1]) / case
        out.mkdir(parents=True)
        try:
            forked(RANKS, partial(train, case, out), port)
        except AssertionError:  # old releases do not run everything under a new torch
            print(f"{case} failed", file=sys.stderr)


if __name__ == "__main__":
    main()
