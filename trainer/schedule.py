"""Learning rates: a pure function of the step, so there is nothing to save."""

from __future__ import annotations

from math import cos, pi

from .sections import ScheduleConfig


def rate(step: int, steps: int, config: ScheduleConfig) -> float:
    """Return the factor of the peak learning rate at ``step`` (counted from 0) of ``steps``."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.floor + (1 - config.floor) * (1 + cos(pi * min(1.0, progress))) / 2
