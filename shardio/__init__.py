"""Bytes, files, lazy tensors, layouts and the on-disk formats.

Knows nothing of architectures or GGUF.
"""

from .checkpoint import Checkpoint
from .layout import Layout
from .registry import Format, OpenOptions, formats, open_checkpoint
from .tensor import LazyTensor, concat, from_array, stack

__all__ = [
    "Checkpoint",
    "Format",
    "Layout",
    "LazyTensor",
    "OpenOptions",
    "concat",
    "formats",
    "from_array",
    "open_checkpoint",
    "stack",
]
