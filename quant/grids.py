"""The point grids of the IQ1, IQ2 and IQ3 formats, taken from gguf-py's decoders.

A grid lists the level vectors that a code may name. The native encoders take each as packed
levels: level ``i`` of a point in bits ``b*i`` and up, with b = 2 for 8 coordinates of 3 levels
and b = 3 for 4 coordinates of 8 levels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GRID_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


def load_grid(name: str) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32]]:
    """Return the grid of type ``name`` in code order.

    Returns:
        The packed levels, uint16 [points], and the decoded values, float32 [points * coordinates].
    """
    from gguf import quants

    codec = getattr(quants, "IQ1_S" if name == "IQ1_M" else name)
    codec.init_grid()
    points = np.asarray(codec.grid).reshape(codec.grid_shape)
    values = np.asarray(codec.grid_map, np.float32)
    levels = np.searchsorted(values, points).astype(np.uint32)
    bits = 2 if levels.shape[1] == 8 else 3
    packed = (levels << (bits * np.arange(levels.shape[1]))).sum(axis=1).astype(np.uint16)
    return packed, np.ascontiguousarray(points, np.float32).reshape(-1)
