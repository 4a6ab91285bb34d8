"""From checkpoints to models that run: namings, architectures, tokenizers, GGUF.

The public functions are imported on first use, so that one of them does not pay for the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {"diff": ".diff", "reshard": ".reshard", "to_gguf": ".to_gguf"}

if TYPE_CHECKING:
    from .diff import diff
    from .reshard import reshard
    from .to_gguf import to_gguf

__all__ = ["diff", "reshard", "to_gguf"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value  # the function, not the submodule of the same name
    return value
