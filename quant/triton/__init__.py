"""Fused kernels for NVIDIA GPUs: rows in, packed bytes out, everything between in registers.

Nothing here is imported before ``usable`` says that a device and triton are there; ``launch`` has
the table of types. Floating point is as strict as on the processor (no contraction, IEEE division
and root, sums in element order), so the bytes are the native kernels'. The grid types (IQ1, IQ2,
IQ3) and the ``best`` searches of the one-shot formats stay with ``..fallback``.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any


@cache
def usable(device: str) -> bool:
    """Return whether fused kernels run on this torch device: NVIDIA, and triton works there."""
    import torch

    if torch.device(device).type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    from ..types import TYPES
    from .launch import encode

    try:  # also compiles: no C compiler or a GPU too old for triton shows up here
        encode(torch.zeros(1, 32, device=device), TYPES["Q8_0"], None)
        torch.cuda.synchronize(device)
    except Exception:  # whatever it is, the torch path gives the same bytes without triton
        return False
    return True


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
