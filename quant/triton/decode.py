"""Decoding on a GPU: one kernel, a lane per element, a value function per format.

The bytes of a block are read by several lanes at once from the first-level cache, so the speed is
that of writing the floats. Values equal the native decoders' bit for bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..types import GgmlType
from . import values
from .launch import OPTIONS, Launch

_SIZE = 1024


@triton.jit
def decode_kernel(
    data: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Write SIZE values; ``count`` is the number of elements."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    here = place < count
    element = tl.where(here, place, 0)
    value = VALUE(data, element // BLOCK * BYTES, element % BLOCK)
    tl.store(out + place, value, mask=here)


def decoding(kind: GgmlType) -> Launch:
    """Return the launch that decodes a type with a kernel."""
    constants = {
        "VALUE": getattr(values, kind.name.lower()),
        "BLOCK": kind.block,
        "BYTES": kind.bytes,
        "SIZE": _SIZE,
    }
    arguments = {"data": "*u8", "out": "*fp32", "count": "i32"}
    return Launch(decode_kernel, arguments, constants, 1)


def decode(data: Any, kind: GgmlType, *, lanes: int = 1) -> Any:
    """Decode a uint8 tensor of whole blocks to float32, flat, on its device.

    Args:
        data: fewer than 2**31 bytes, for fewer than 2**31 elements.
        kind: a type with a kernel.
        lanes: how many times more elements a program takes; only the interpreter gains from it.
    """
    import torch

    flat = data.reshape(-1)
    count = flat.numel() // kind.bytes * kind.block
    assert count < 1 << 31
    out = torch.empty(count, dtype=torch.float32, device=data.device)
    constants = decoding(kind).constants
    constants["SIZE"] *= lanes
    grid = (-(-count // constants["SIZE"]),)
    with torch.cuda.device(flat.get_device()):
        decode_kernel[grid](flat, out, count, **constants, **OPTIONS)
    return out
