"""Fused kernels for NVIDIA GPUs: rows in, packed bytes out, everything between in registers.

Nothing here is imported before ``usable`` says that a device and triton are there; ``launch`` has
the table of types. Floating point is as strict as on the processor (no contraction, IEEE division
and root, sums in element order), so the bytes are the native kernels'. The grid types (IQ1, IQ2,
IQ3) and the ``best`` searches of the one-shot formats stay with ``..fallback``.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

_OLDEST = (3, 6)  # before, triton's IEEE division flushes denormals


@cache
def usable(device: str) -> bool:
    """Return whether fused kernels run on this torch device: NVIDIA, and triton works there."""
    import torch

    if torch.device(device).type != "cuda" or torch.version.hip or not _installed():
        return False
    try:  # no C compiler, or a GPU too old for triton, shows up here
        return _self_test(device)
    except Exception:  # whatever it is, the torch path gives the same bytes without triton
        return False


def _installed() -> bool:
    try:
        found = version("triton").split(".")
    except PackageNotFoundError:
        return False
    return tuple(int(part) for part in found[:2]) >= _OLDEST


def _self_test(device: str) -> bool:
    """Compile one kernel and compare it with numpy where arithmetic that is not strict shows."""
    import torch

    from .. import fallback
    from ..types import TYPES
    from .launch import encode

    scales = np.array([[1], [3e-41], [7e-37]], np.float32)
    x = scales * np.linspace(-1, 1.3, 96, dtype=np.float32)
    kind = TYPES["Q8_0"]
    data, _ = encode(torch.from_numpy(x).to(device), kind, None)
    return bool((data.cpu().numpy() == fallback.encode(x, kind, None)).all())


def decoder(device: str, kind: Any) -> Any:
    """Return ``decode.decode`` if it can decode ``kind`` on ``device``, else None."""
    if not usable(device):
        return None
    from .decode import decode
    from .launch import has_kernel

    return decode if has_kernel(kind.name) else None


def encoder(device: str, kind: Any, *, full: bool = False) -> Any:
    """Return ``launch.encode`` if it can encode ``kind`` on ``device``, else None."""
    if not usable(device):
        return None
    from .launch import encode, has_kernel

    return encode if has_kernel(kind.name, full=full) else None
