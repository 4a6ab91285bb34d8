"""Random states as a rank has them right after it was seeded.

Megatron's loader demands ``rng_state`` of a legacy checkpoint; states of other ranks would be
wrong, so these are those of a fresh start. Source: ``_set_random_seed`` in ``megatron/training/
initialize.py``, ``megatron/core/tensor_parallel/random.py``, the state layout of torch's
``aten/src/ATen/CPUGeneratorImpl.cpp``.
"""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np

from .divide import Place

_SEED = 1234  # Megatron's default of --seed
_WORDS = 624


def random_states(seed: object, place: Place) -> list[dict[str, Any]]:
    """Return the ``rng_state`` entry of a rank.

    Args:
        seed: the run's ``--seed``; anything but an int means Megatron's default.
        place: the rank.
    """
    base = (seed if type(seed) is int and seed > 0 else _SEED) + 100 * place.pp
    kind, words, position, *gauss = np.random.RandomState(base).get_state()
    trackers = {
        "data-parallel-rng": base,
        "model-parallel-rng": base + 2718 + place.tp,
        "expert-parallel-rng": base + 1024 + 100 * place.ep + place.etp,
    }
    return [
        {
            "random_rng_state": random.Random(base).getstate(),
            "np_rng_state": (kind, np.asarray(words).tolist(), position, *gauss),
            "torch_rng_state": _torch_state(base, np.asarray(words)),
            "cuda_rng_state": _cuda_state(base),
            "rng_tracker_states": {name: _cuda_state(s) for name, s in trackers.items()},
        }
    ]


def _torch_state(seed: int, words: np.ndarray) -> np.ndarray:
    """State of torch's CPU generator: numpy's Mersenne twister is seeded alike."""
    head = struct.pack("<QiiQ", seed, 1, 1, 0)
    return np.frombuffer(head + words.astype("<u8").tobytes() + bytes(40), np.uint8)


def _cuda_state(seed: int) -> np.ndarray:
    """State of a CUDA generator: seed and offset."""
    return np.frombuffer(struct.pack("<QQ", seed, 0), np.uint8)
