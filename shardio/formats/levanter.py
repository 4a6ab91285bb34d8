"""Levanter checkpoints (JAX): one zarr array per leaf of the training state, as folders.

``metadata.json`` says the step, ``model/transformer/layers/...`` hold the model, ``opt_state`` the
optimizer. Read natively (gzip; zstd with the package ``zstandard``); names are translated by
``convert/naming/levanter``. Source: levanter ``checkpoint.py``, ``tensorstore_serialization.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import FormatError
from ..assets import load_json
from ..checkpoint import Checkpoint
from ..jax_checkpoint import jax_checkpoint
from ..megatron.zarr import ARRAY, open_array
from ..packed_file import unpack_chunk
from ..registry import Format, OpenOptions
from ..tensor import LazyTensor

_METADATA, _MODEL = "metadata.json", "model"
_MARKS = ("embeddings/token_embeddings/weight", "embeddings", "transformer")
_MAX_DEPTH = 24


def detect(path: Path) -> Path | None:
    """Return the folder of a step."""
    if path.is_file():
        path = path.parent if path.name == _METADATA else path
    if not (path / _METADATA).is_file():
        return None
    return path if any((path / _MODEL / m).is_dir() for m in _MARKS) else None


def open_levanter(root: Path, options: OpenOptions) -> Checkpoint:
    """Open the folder of a step.

    Raises:
        FormatError: no arrays, missing or short chunks.
        UnsupportedError: zstd without the package ``zstandard``, other codecs.
    """
    arrays: dict[str, LazyTensor] = {}
    for folder in _arrays(root):
        arrays[".".join(folder.relative_to(root).parts)] = open_array(folder, unpack_chunk)
    saved = load_json(root / _METADATA)
    step = saved.get("step") if isinstance(saved, dict) else None
    return jax_checkpoint(
        root,
        options,
        arrays,
        name="levanter",
        model=_MODEL,
        step=step if type(step) is int else None,
    )


def _arrays(root: Path) -> list[Path]:
    """The array folders below the root, in order; links are not followed."""
    found = []
    for place, folders, files in os.walk(root):
        folder = Path(place)
        folders[:] = sorted(n for n in folders if not n.startswith("."))
        if ARRAY in files:
            found.append(folder)
            folders.clear()
        elif len(folder.relative_to(root).parts) > _MAX_DEPTH:
            raise FormatError(f"{folder}: folders are nested too deeply for a training state")
    return found


FORMAT = Format("levanter", "levanter (JAX)", detect, open_levanter, rank=56)
