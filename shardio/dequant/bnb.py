"""bitsandbytes' 4-bit weights (NF4, FP4): flat blocks of 64 values with their maxima.

``weight`` has two values in a byte, the first in the high half; ``weight.absmax`` may be quantized
itself (``nested_absmax``, an offset). ``weight.quant_state.bitsandbytes__nf4`` is JSON with shape
and block sizes. Source: bitsandbytes ``functional.py`` (``QuantState``, ``dequantize_4bit``).
"""

from __future__ import annotations

import json
from math import prod
from typing import Any

import numpy as np

from ...errors import FormatError
from ..tensor import LazyTensor
from .node import F32, Decoded


class FourBit(Decoded):
    """A vector of values as a matrix of one block per row."""

    __slots__ = ("_map", "_nested", "_offset", "_small")

    def __init__(
        self, packed: LazyTensor, absmax: LazyTensor, table: np.ndarray, state: dict[str, Any],
        nested: tuple[LazyTensor, np.ndarray] | None,
    ) -> None:  # fmt: skip
        block = int(state["blocksize"])
        parts = (packed, absmax) if nested is None else (packed, absmax, nested[0])
        super().__init__((absmax.size, block), F32, parts, unit=(1, block))
        self._map = table
        self._nested = None if nested is None else nested[1]
        self._small = int(state.get("nested_blocksize", 1))
        self._offset = np.float32(state.get("nested_offset", 0.0))

    def decode(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Decode whole blocks."""
        packed, absmax = self._parts[:2]
        block = self.shape[1]
        lo, hi = top * block // 2, min(bottom * block // 2, packed.size)
        data = packed.read([slice(lo, hi)])
        codes = np.stack([data >> 4, data & 15], axis=1).reshape(-1)
        value = np.zeros((bottom - top) * block, F32)
        value[: codes.size] = self._map[codes]
        scale = absmax.read([slice(top, bottom)])
        if self._nested is not None:
            first, last = top // self._small, -(-bottom // self._small)
            outer = self._parts[2].read([slice(first, last)]).astype(F32)
            owner = np.arange(top, bottom) // self._small - first
            scale = self._nested[scale] * outer[owner] + self._offset
        return value.reshape(-1, block) * scale.astype(F32)[:, None]


def four_bit(name: str, parts: dict[str, LazyTensor], dtype: np.dtype) -> LazyTensor:
    """Return the weight of ``weight`` and the tensors below its name.

    Raises:
        FormatError: tensors missing, a malformed state, shapes that do not fit.
    """
    key = next((k for k in parts if k.startswith("quant_state.")), None)
    try:
        state = json.loads(parts[key].read().tobytes()) if key else {}
        shape = tuple(int(n) for n in state["shape"])
        block = int(state["blocksize"])
        table = parts["quant_map"].read().astype(F32)
        packed, absmax = parts[""], parts["absmax"]
        nested = None
        if "nested_absmax" in parts:
            nested = parts["nested_absmax"], parts["nested_quant_map"].read().astype(F32)
    except (KeyError, ValueError, TypeError) as e:
        raise FormatError(f"{name}: bitsandbytes state is missing or malformed ({e})") from e
    size = prod(shape)
    fits = block > 0 and absmax.size == -(-size // block) and packed.size == -(-size // 2)
    if not fits or table.size != 16 or (nested is not None and nested[1].size != 256):
        raise FormatError(
            f"{name}: {list(shape)} in blocks of {block} does not fit {packed.size} bytes and "
            f"{absmax.size} scales"
        )
    whole = FourBit(
        packed.reshape((packed.size,)), absmax.reshape((absmax.size,)), table, state, nested
    )
    return whole.reshape((-1,)).slice([slice(0, size)]).reshape(shape).cast(dtype)
