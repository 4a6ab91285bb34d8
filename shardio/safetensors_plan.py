"""Planning safetensors files: which tensor goes to which byte of which file.

Files are named as ``save_pretrained`` names them: ``model.safetensors``, or
``model-0000i-of-0000n.safetensors`` with an index. Inside a file tensors are ordered by falling
element size and name, as the safetensors library does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import Tensors
from .payload import BytesPayload, Payload, TensorPayload
from .safetensors_header import build_header
from .stream import OutFile
from .tensor import LazyTensor

DEFAULT_SHARD = 5_000_000_000


def plan_tensors(stem: str, tensors: Tensors, max_shard_size: int = DEFAULT_SHARD) -> list[OutFile]:
    """Plan the safetensors files (and the index, when there are several) of some tensors.

    Args:
        stem: ``model`` or ``optimizer``.
        tensors: names to lazy tensors; files are filled in this order.
        max_shard_size: bytes of tensor data per file; a bigger tensor gets a file of its own.
    """
    groups = _groups(tensors, max_shard_size)
    files, index = [], {}
    for k, names in enumerate(groups):
        name = f"{stem}.safetensors"
        if len(groups) > 1:
            name = f"{stem}-{k + 1:05d}-of-{len(groups):05d}.safetensors"
        files.append(_file(name, [(n, tensors[n]) for n in names]))
        index.update(dict.fromkeys(names, name))
    if len(groups) > 1:
        total = sum(t.nbytes for t in tensors.values())
        count = sum(t.size for t in tensors.values())
        content = {
            "metadata": {"total_parameters": count, "total_size": total},
            "weight_map": dict(sorted(index.items())),
        }
        files.append(plan_json(f"{stem}.safetensors.index.json", content))
    return files


def plan_json(name: str, content: Mapping[str, Any]) -> OutFile:
    """Plan a small JSON file."""
    return plan_bytes(name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def plan_bytes(name: str, data: bytes) -> OutFile:
    """Plan a small file with the given content."""
    return OutFile(name, len(data), ((0, BytesPayload(data)),))


def plan_copies(assets: Sequence[Path], taken: Sequence[OutFile]) -> list[OutFile]:
    """Plan copies of small files, except names that are already planned."""
    names = {f.name for f in taken}
    return [plan_bytes(p.name, p.read_bytes()) for p in assets if p.name not in names]


def _groups(tensors: Tensors, limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= tensor.nbytes
    return groups


def _file(name: str, items: Sequence[tuple[str, LazyTensor]]) -> OutFile:
    ordered = sorted(items, key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, starts = build_header([(n, t.dtype, t.shape) for n, t in ordered], {"format": "pt"})
    parts: list[tuple[int, Payload]] = [(0, BytesPayload(header))]
    end = len(header)
    for (_, tensor), start in zip(ordered, starts, strict=True):
        parts.append((start, TensorPayload(tensor)))
        end = start + tensor.nbytes
    return OutFile(name, end, tuple(parts))
