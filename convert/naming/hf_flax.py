"""Names of Hugging Face's own Flax models: torch's, with ``kernel``, ``scale`` and ``embedding``
for
``weight``.

Kernels are the transpose of torch's weights (of GPT-2's Conv1D too); everything else is the same,
whatever the architecture. Source: transformers 4 ``modeling_flax_pytorch_utils.py``,
``models/*/modeling_flax_*.py``.
"""

from __future__ import annotations

from ...shardio.checkpoint import Checkpoint
from ..movement import transpose
from ._mirror import Step, mirrored, not_described, not_written, same
from .record import Naming, Request

_TITLE = "Hugging Face Flax"
_ENDS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def _torch_name(name: str) -> tuple[str, Step]:
    while name.startswith("params."):
        name = name.removeprefix("params.")
    stem, dot, end = name.rpartition(".")
    return f"{stem}{dot}{_ENDS.get(end, end)}", transpose if end == "kernel" else same


def _restore(ckpt: Checkpoint, request: Request) -> Checkpoint:
    return mirrored(ckpt, _torch_name)


NAMING = Naming("hf_flax", _TITLE, not_described(_TITLE), not_written(_TITLE), _restore)
