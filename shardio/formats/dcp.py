"""PyTorch distributed checkpoints (DCP): FSDP2, TP, FSDP x TP, HSDP, pipeline stages.

``.metadata`` and ``__<rank>_<n>.distcp`` files, or one ``__<rank>.metadata`` per rank; accelerate's
pair of folders ``pytorch_model_fsdp_<i>`` and ``optimizer_<i>``; items as torch archives,
compressed by the zstd extension, or whole files in safetensors format. Source:
``torch/distributed/checkpoint/{filesystem,default_planner,_extension}.py`` (torch 2.0 to 2.13).
Coverage is proven from the metadata at open; items are located at their first read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint import Checkpoint
from ..coverage import prove
from ..dcp_folder import DcpFolder
from ..dcp_metadata import METADATA, DcpMetadata, TensorEntry, metadata_files
from ..layout import Layout
from ..placement import Placement, Shard
from ..registry import Format, OpenOptions
from ..state_checkpoint import build_checkpoint
from ..state_tree import OPTIMIZER_ROOTS, KeyPath, examine, nest

_MODEL_FOLDER = re.compile(r"^pytorch_model_fsdp_(\d+)$")
_RANK_FILE = re.compile(r"^__(\d+)_\d+\.distcp$")


def detect(path: Path) -> Path | None:
    """Return the folder with the metadata (of the model, where the optimizer has its own)."""
    if path.is_file():
        return path.parent if path.suffix == ".distcp" or path.name == METADATA else None
    model = path / "pytorch_model_fsdp_0"
    if _has_metadata(model):
        return model
    beside = path.parent / path.name.replace("optimizer_", "pytorch_model_fsdp_")
    if path.name.startswith("optimizer_") and _has_metadata(beside):
        return beside
    return path if _has_metadata(path) else None


def _has_metadata(folder: Path) -> bool:
    """Whether this is a DCP folder, finished or not."""
    if not folder.is_dir():
        return False
    return bool(metadata_files(folder)) or any(
        _RANK_FILE.match(p.name) for p in folder.glob("__*.distcp")
    )


def open_dcp(root: Path, options: OpenOptions) -> Checkpoint:
    """Open a checkpoint folder.

    Raises:
        FormatError: unfinished saves, missing or short files, holes, overlaps, swapped files.
        UnsupportedError: transforms other than zstd, or zstd without its package.
    """
    parts = [DcpFolder(root)]
    match = _MODEL_FOLDER.match(root.name)
    if match and _has_metadata(root.parent / f"optimizer_{match[1]}"):
        parts.append(DcpFolder(root.parent / f"optimizer_{match[1]}"))
    flat: dict[KeyPath, object] = {}
    keys: dict[int, tuple[DcpFolder, str]] = {}
    for k, part in enumerate(parts):
        for path, value, key in part.leaves():
            place = path if k == 0 or str(path[0]) in OPTIMIZER_ROOTS else ("optimizer", *path)
            flat[place] = value
            keys[id(value)] = (part, key)
    tree = examine(nest(flat))
    origin = {n: keys[id(t)] for n, t in tree.weights.items()}
    entries = {n: part.metadata.tensors[key] for n, (part, key) in origin.items()}
    checkpoint = build_checkpoint(
        root,
        "dcp",
        tree,
        options,
        version=parts[0].metadata.version,
        layout=_layout(parts[0].metadata, entries.values()),
        placements={n: p for n, e in entries.items() if (p := _placement(e))},
        replicas={n: part.copies(key) for n, (part, key) in origin.items()},
        warnings=[note for part in parts for note in part.notes],
    )
    prove(checkpoint.weights, root)
    for state, tensors in checkpoint.optimizer.items():
        prove(tensors, f"{root}: optimizer state {state}")
    return checkpoint


def _layout(metadata: DcpMetadata, entries: Iterable[TensorEntry]) -> Layout:
    """Guess the mesh from the chunk grids: cuts along dim 1 are tensor parallel."""
    tp = total = 1
    for entry in entries:
        cuts = [len({c.offsets[d] for c in entry.chunks}) for d in range(len(entry.shape))]
        tp = max(tp, *cuts[1:]) if len(cuts) > 1 else tp
        total = max(total, len(entry.chunks))
    return Layout(format="dcp", tp=tp, dp=total // tp if total % tp == 0 else total)


def _placement(entry: TensorEntry) -> dict[str, Placement]:
    cut = [d for d in range(len(entry.shape)) if len({c.offsets[d] for c in entry.chunks}) > 1]
    if len(cut) == 1:
        return {"mesh": Shard(cut[0])}
    return {f"mesh{d}": Shard(d) for d in cut}


FORMAT = Format("dcp", "PyTorch distributed checkpoint (DCP)", detect, open_dcp, rank=60)
