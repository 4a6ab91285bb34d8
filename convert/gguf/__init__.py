"""GGUF files: a fast, careful reader and a header writer (format: ggml's GGUF v3)."""

from __future__ import annotations

from .reader import GgufFile, TensorInfo, open_gguf
from .scan import StringArray
from .values import KeyValue, ValueType
from .writer import Header, TensorSpec, build_header

__all__ = [
    "GgufFile",
    "Header",
    "KeyValue",
    "StringArray",
    "TensorInfo",
    "TensorSpec",
    "ValueType",
    "build_header",
    "open_gguf",
]
