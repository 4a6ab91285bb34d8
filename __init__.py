"""mconv: turn any trained LLM checkpoint into a model that runs.

The public names are imported on first use, so that ``import mconv`` stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Folders whose modules with a ``FORMAT`` are checkpoint formats.
FORMAT_PACKAGES = (".shardio.formats", ".convert.formats")

_PUBLIC = {
    "open_checkpoint": ".shardio",
    "Checkpoint": ".shardio",
    "LazyTensor": ".shardio",
    "Layout": ".shardio",
    "MconvError": ".errors",
    "reshard": ".convert.reshard",
    "roundtrip": ".convert.roundtrip",
    "to_gguf": ".convert.to_gguf",
    "from_gguf": ".convert.from_gguf",
    "diff": ".convert.diff",
}

if TYPE_CHECKING:
    from .convert.diff import diff
    from .convert.from_gguf import from_gguf
    from .convert.reshard import reshard
    from .convert.roundtrip import roundtrip
    from .convert.to_gguf import to_gguf
    from .errors import MconvError
    from .shardio import Checkpoint, Layout, LazyTensor, open_checkpoint

__all__ = [
    "Checkpoint",
    "Layout",
    "LazyTensor",
    "MconvError",
    "__version__",
    "diff",
    "from_gguf",
    "open_checkpoint",
    "reshard",
    "roundtrip",
    "to_gguf",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    if name in ("convert", "quant", "shardio", "trainer"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'mconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "convert", "quant", "shardio", "trainer"])
