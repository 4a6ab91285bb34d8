"""Quantization: every ggml tensor type, to and from float arrays, with ggml's exact bytes.

``quantize`` and ``dequantize`` work on numpy arrays and know nothing of files. ``types`` is the
table of formats, ``recipes`` chooses a type per tensor, ``native/`` holds the C++ kernels and
``fallback/`` the same algorithms in numpy for machines without a compiler.
"""

from __future__ import annotations

from ..errors import QuantError
from .codec import dequantize, have_native, quantize
from .measure import ErrorSums
from .types import TYPES, GgmlType, type_by_id, type_by_name

__all__ = [
    "TYPES",
    "ErrorSums",
    "GgmlType",
    "QuantError",
    "dequantize",
    "have_native",
    "quantize",
    "type_by_id",
    "type_by_name",
]
