"""Quantize on a torch device: by fused kernels on NVIDIA GPUs, else by ``fallback``'s programs.

Rows are sent in slabs in their own dtype, encoded there, and only the encoded bytes come back.
Both ways give the same bytes; the fused kernels are taken where triton is installed and has one
for the type. torch is imported here and in ``triton`` and nowhere else in this package.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .fallback import array_encoder
from .floats import BFLOAT16
from .triton import decoder, encoder
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
    fused = encoder(device, kind, full=full)
    program = array_encoder(kind, full=full)
    assert program is not None
    importance = None if weights is None else torch.from_numpy(weights).to(device)
    if full and importance is None:
        importance = torch.ones(x.shape[1], device=device)
    step = max(1, _SLAB // x.shape[1])
    for start in range(0, x.shape[0], step):
        rows = _send(torch, x[start : start + step], device)
        if fused is not None:
            data, bad = fused(rows, kind, importance, full=full)
            if int(bad):
                return False
        else:
            rows = rows.float()
            if not bool(torch.isfinite(rows).all()):
                return False
            data = program(rows, importance)
        out[start : start + step] = data.cpu().numpy()
    return True


def dequantize_on(
    device: str, data: npt.NDArray[np.uint8], kind: GgmlType
) -> npt.NDArray[np.float32] | None:
    """Decode flat bytes on ``device``; None if there is no kernel for it there.

    Raises:
        ConfigError: torch is not installed, or the device does not exist.
    """
    torch = _torch(device)
    fused = decoder(device, kind)
    if fused is None:
        return None
    values = np.empty(data.size // kind.bytes * kind.block, np.float32)
    step = max(1, _SLAB // kind.block)
    for start in range(0, data.size // kind.bytes, step):
        part = torch.from_numpy(data[start * kind.bytes : (start + step) * kind.bytes])
        found = fused(part.to(device), kind).cpu().numpy()
        values[start * kind.block : (start + step) * kind.block] = found
    return values


def _send(torch: Any, x: npt.NDArray, device: str) -> Any:
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.int16)).to(device).view(torch.bfloat16)
    return torch.from_numpy(x).to(device)


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
