"""Quantize on a torch device (a GPU): the array programs of ``fallback`` on torch tensors.

Rows are sent in slabs in their own dtype, widened on the device, encoded there, and only the
encoded bytes come back. torch is imported here and nowhere else in this package.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .fallback import array_encoder
from .floats import BFLOAT16
from .types import GgmlType

_SLAB = 1 << 25  # elements on the device at once: about 4 GiB of working memory


def has_array_program(kind: GgmlType) -> bool:
    """Return whether ``kind`` can be encoded on a torch device."""
    return array_encoder(kind) is not None


def quantize_on(
    device: str,
    x: npt.NDArray,
    kind: GgmlType,
    weights: npt.NDArray[np.float32] | None,
    out: npt.NDArray[np.uint8],
    *,
    full: bool = False,
) -> bool:
    """Encode rows [rows, cols] into ``out`` on ``device``; returns false if a value is not finite.

    ``full`` takes the full search for the least error instead of ggml's algorithm.

    Raises:
        ConfigError: torch is not installed, or the device does not exist.
    """
    torch = _torch(device)
    encoder = array_encoder(kind, full=full)
    assert encoder is not None
    importance = None if weights is None else torch.from_numpy(weights).to(device)
    if full and importance is None:
        importance = torch.ones(x.shape[1], device=device)
    step = max(1, _SLAB // x.shape[1])
    for start in range(0, x.shape[0], step):
        rows = _send(torch, x[start : start + step], device)
        if not bool(torch.isfinite(rows).all()):
            return False
        out[start : start + step] = encoder(rows, importance).cpu().numpy()
    return True


def _send(torch: Any, x: npt.NDArray, device: str) -> Any:
    if x.dtype == BFLOAT16:
        tensor = torch.from_numpy(x.view(np.int16)).to(device).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(x).to(device)
    return tensor.float()


def _torch(device: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"device {device!r} needs torch: pip install torch") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot use device {device!r}: {reason}; use device='cpu'") from error
    return torch
