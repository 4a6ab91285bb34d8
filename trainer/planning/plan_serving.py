"""Which GGUF type of a model fits which machine: weights, keys and values, room to compute."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ...convert.model_sizes import ModelSizes
from .plan import Machines


@dataclass(frozen=True, slots=True)
class ServeRow:
    """How a GGUF type fits."""

    type: str
    weights: int  # bytes
    total: int  # with keys and values and room to compute
    gpus: int | None  # how many of the given ones it needs; None when all are too few
    context: int  # tokens that fit on these


def plan_serving(sizes: ModelSizes, machines: Machines, context: int) -> list[ServeRow]:
    """Return what every GGUF type needs for one sequence of ``context`` tokens, best type first.

    Layers are spread over GPUs, as llama.cpp does.
    """
    rows = []
    room = machines.usable
    work = 4 * 512 * (sizes.vocab + 3 * sizes.inner + 6 * sizes.hidden)
    for name, weights in sizes.gguf.items():
        total = weights + sizes.kv_bytes(context) + work
        needed = ceil(total / room) if room > 0 else machines.gpus + 1
        gpus = needed if needed <= machines.gpus else None
        left = (gpus or machines.gpus) * room - weights - work
        tokens = max(0, left // max(1, sizes.kv_bytes(1)))
        rows.append(ServeRow(name, weights, total, gpus, min(tokens, sizes.context)))
    return rows
