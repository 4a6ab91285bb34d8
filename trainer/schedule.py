"""Learning rates: a pure function of the step, so there is nothing to save."""

from __future__ import annotations

from math import cos, pi, sqrt

from .sections import ScheduleConfig


def rate(step: int, steps: int, config: ScheduleConfig) -> float:
    """Return the factor of the peak learning rate at ``step`` (counted from 0) of ``steps``.

    After a linear warm-up: ``cosine`` and ``linear`` fall to ``floor`` over all the rest,
    ``constant`` stays, ``wsd`` stays and falls over the last ``decay`` steps with 1 - sqrt
    (Hägele et al. 2024).
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.kind == "constant":
        return 1.0
    start = config.warmup
    if config.kind == "wsd":
        start = max(start, steps - (config.decay or max(1, steps // 10)))
    done = min(1.0, max(0, step - start) / max(1, steps - start))
    left = {"cosine": (1 + cos(pi * done)) / 2, "linear": 1 - done, "wsd": 1 - sqrt(done)}
    return config.floor + (1 - config.floor) * left[config.kind]
