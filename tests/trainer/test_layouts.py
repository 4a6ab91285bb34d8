"""Every parallel layout trains exactly as the plain loop: loss and gradient norm of every step.

In float64 over gloo, so that nothing but the order of summation differs: 1e-12 is far below what
any wrong factor, mask, shard or missed gradient would do. Labels are masked unevenly, and gradients
are accumulated over micro-batches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from .ranks import Ranks  # noqa: E402
from .toys import run_config, single, trained  # noqa: E402

SCHEDULES = (
    "GPipe",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)
FULL_TP = {"tp": 2, "sp": True, "loss_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2 zero3": {},
    "dp2 zero2": {"zero": 2},
    "dp2 zero1": {"zero": 1},
    "ddp2": {"zero": 0},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "tp2": {"tp": 2},
    "tp2 sp loss": FULL_TP,
    "cp2": {"cp": 2},
    "ep2": {"ep": 2},
    "pp2": {"pp": 2},
    **{f"pp2 {name}": {"pp": 2, "schedule": name} for name in SCHEDULES},
    "dp2 tp2": {"dp_shard": 2, **FULL_TP},
    "dp2 pp2": {"dp_shard": 2, "pp": 2},
    "tp2 pp2": {"pp": 2, **FULL_TP},
    "dp2 tp2 pp2": {"dp_shard": 2, "pp": 2, **FULL_TP},
}
CASES = [
    ("dp2 zero3", "dense"),
    ("dp2 zero3", "tied"),
    ("dp2 zero2", "moe"),
    ("dp2 zero1", "gqa"),
    ("ddp2", "tied"),
    ("hsdp", "gqa"),
    ("tp2", "dense"),
    ("tp2", "moe"),
    ("tp2 sp loss", "tied"),
    ("tp2 sp loss", "gqa"),
    ("cp2", "gqa"),
    ("cp2", "moe"),
    ("ep2", "moe"),
    ("pp2", "dense"),
    ("pp2", "tied"),
    ("pp2 GPipe", "moe"),
    ("pp2 Interleaved1F1B", "tied"),
    ("pp2 LoopedBFS", "gqa"),
    ("pp2 InterleavedZeroBubble", "moe"),
    ("pp2 ZBVZeroBubble", "tied"),
    ("pp2 DualPipeV", "gqa"),
    ("dp2 tp2", "tied"),
    ("dp2 tp2", "moe"),
    ("dp2 pp2", "tied"),
    ("tp2 pp2", "gqa"),
    ("dp2 tp2 pp2", "tied"),
]


def world_size(layout: dict[str, Any]) -> int:
    degrees = [layout.get(n, 1) for n in ("dp_replicate", "tp", "cp", "pp")]
    rest = 1 if np.prod(degrees) > 1 else 2
    return int(np.prod(degrees)) * layout.get("dp_shard", rest)


def check(
    ranks: Ranks,
    layout: dict[str, Any],
    model: str,
    packed: bool = False,
    tolerance: float = 1e-12,
    **train: Any,
) -> None:
    """Compare a layout with the plain loop."""
    world = world_size(layout)
    config = run_config(model, train, **layout)
    expected = ranks(trained, 1, single(config), packed)[0]
    got = ranks(trained, world, config, packed)
    for one in got:
        np.testing.assert_allclose(one, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_layout_equals_the_plain_loop(ranks: Ranks, layout: str, model: str) -> None:
    check(ranks, LAYOUTS[layout], model)
