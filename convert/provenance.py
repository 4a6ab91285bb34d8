"""``mconv.json``: where an output folder comes from, what it is and what it lacks.

Tensor data are copied by the kernel and not hashed: ``plan`` is a SHA-256 of the place of every
byte and of path, size and time of every source file; ``sha256`` is of what was made here (headers,
pickles, JSON), file by file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import __version__
from ..shardio import Checkpoint, Layout
from ..shardio.payload import BytesPayload
from ..shardio.safetensors_plan import plan_json
from ..shardio.stream import OutFile
from ..shardio.writers import Planned

NAME = "mconv.json"


def provenance(
    ckpt: Checkpoint,
    layout: Layout,
    planned: Planned,
    *,
    weights: str,
    digest: str,
    sources: Iterable[Path],
    notes: Iterable[str] = (),
) -> OutFile:
    """Return the file.

    Args:
        ckpt: the source as it was opened.
        layout: the target.
        planned: what is written, and what the writer could not carry.
        weights: ``model`` or ``master``.
        digest: of the plan and its sources.
        sources: the files that tensors are read from.
        notes: what else a user should know.
    """
    content = {
        "mconv": __version__,
        "source": {
            "path": str(ckpt.path),
            "format": ckpt.format,
            "version": ckpt.version,
            "layout": ckpt.layout.describe(),
            "step": ckpt.step,
            "files": _stamps(ckpt.path, sources),
        },
        "layout": layout.describe(),
        "options": options_of(layout),
        "weights": weights,
        "not_carried": list(planned.warnings),
        "notes": list(notes),
        "plan": digest,
        "files": {f.name: f.size for f in planned.files},
        "sha256": {f.name: made for f in planned.files if (made := _own(f)) is not None},
    }
    return plan_json(NAME, content)


def options_of(layout: Layout) -> dict[str, Any]:
    """The fields of a layout that are not at their defaults."""
    given = {f.name: (getattr(layout, f.name), f.default) for f in fields(layout)}
    return {k: value for k, (value, default) in given.items() if value != default}


def _stamps(folder: Path, sources: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Size and time of every source file, below the folder by their relative names."""
    found = {}
    for path in sorted(set(sources)):
        if path.exists():
            stat = path.stat()
            name = path.relative_to(folder) if path.is_relative_to(folder) else path
            found[str(name)] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return found


def _own(file: OutFile) -> str | None:
    """SHA-256 of the parts of a file that were made here; None where there are none."""
    made = [payload.data for _, payload in file.parts if isinstance(payload, BytesPayload)]
    if not made:
        return None
    digest = hashlib.sha256()
    for data in made:
        digest.update(data)
    return digest.hexdigest()
