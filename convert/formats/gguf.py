"""A GGUF model as a checkpoint: quantized blocks are decoded when they are read.

Weights keep their GGUF names (naming ``gguf``), metadata become ``args``. What the file's types
have rounded away stays lost, which a warning says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FormatError
from ...shardio.checkpoint import Checkpoint
from ...shardio.coverage import prove
from ...shardio.layout import Layout
from ...shardio.registry import Format, OpenOptions
from ...shardio.source import open_file
from ...shardio.state_checkpoint import model_files
from ..gguf import open_gguf
from ..gguf.factors import factored_values, factors_beside
from ..gguf.tensors import GgufTensors

_MAGIC = b"GGUF"
_SPLIT = "-00001-of-"
_HEAD = 4096  # bytes that the first keys lie in
_TYPE = b"general.type\x08\0\0\0"  # a string: its length of 8 bytes follows
_MOST_ITEMS = 1024  # of an array that becomes a setting; vocabularies do not


def detect(path: Path) -> Path | None:
    """Return the file, or the only model (first split) of a folder.

    An importance matrix beside it, as the trainer leaves in a run's folder, is no model.
    """
    if path.is_file():
        return path if _head(path).startswith(_MAGIC) else None
    found = [p for p in sorted(path.glob("*.gguf")) if _SPLIT in p.name or "-of-" not in p.name]
    heads = {p: head for p in found if not _is_imatrix(head := _head(p))}
    return (
        next((p for p in heads if heads[p].startswith(_MAGIC)), None) if len(heads) == 1 else None
    )


def _is_imatrix(head: bytes) -> bool:
    _, found, value = head.partition(_TYPE)
    return bool(found) and value[8:].startswith(b"imatrix")


def _head(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def open_gguf_checkpoint(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a file, or all files of a split model.

    Raises:
        FormatError: damaged files, missing splits, no tensors (a vocabulary alone).
        UnsupportedError: big-endian files, unknown types.
    """
    file = open_gguf(root)
    tensors = GgufTensors(file)
    factors, beside = factors_beside(file)
    weights = {
        name: factored_values(tensors, factors, name) for name in file.tensors if name not in beside
    }
    if not weights:
        raise FormatError(f"{root}: holds no tensors, only a vocabulary")
    prove(weights, root)
    kinds = sorted({i.type.name for i in file.tensors.values()} - {"F32", "F16", "BF16", "F64"})
    notes = []
    if kinds:
        notes.append(
            f"tensors of {', '.join(kinds)} are decoded to float32: what quantization rounded "
            "away does not come back"
        )
    config, assets = model_files(root, options)
    return Checkpoint(
        path=root,
        format="gguf",
        version=str(file.version),
        naming="gguf",
        weights=weights,
        config=config,
        args={key: v for key in file.entries if (v := _plain(file[key])) is not None},
        layout=Layout(format="gguf"),
        assets=assets,
        warnings=tuple(notes),
    )


def _plain(value: Any) -> Any:
    """Metadata as plain data; None for what is too long to be a setting."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "__len__") and len(value) <= _MOST_ITEMS:
        return [_plain(v) for v in value]
    return None


FORMAT = Format("gguf", "GGUF", detect, open_gguf_checkpoint, rank=80)
