"""Plain ``torch.save`` files: DDP, Horovod and single-process training scripts.

One file with a state dict, bare or within a dict of other things (``model``, ``state_dict``,
``optimizer``, ``step``...): see ``state_tree`` for how the weights are found. An optimizer in a
file of its own (``optimizer.bin`` of accelerate) is read too. Source: ``torch/serialization.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import FormatError, UnsupportedError
from ..checkpoint import Checkpoint
from ..dtensor import is_sharded
from ..records import Record, StoredTensor
from ..registry import Format, OpenOptions
from ..source import open_file
from ..state_checkpoint import build_checkpoint
from ..state_tree import examine
from ..torchfile import open_torch_file
from ..torchlegacy import is_legacy

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_OTHER = re.compile(
    r"^(?:optim|scheduler|sched|rng|random_state|training_args|scaler|dataloader|extra_state|"
    r"sampler|custom_checkpoint)|(?:^|[_.-])(?:rank|world_size|mp_rank|zero_pp_rank|part|shard)|"
    r"^consolidated\.\d+|^(?:pytorch_)?model-\d+|^pytorch_model(?:\..+)?\.bin$|^adapter_model",
    re.IGNORECASE,
)
_OPTIMIZERS = ("optimizer.bin", "optimizer.pt", "optim.pt", "optimizer.pth")


def detect(path: Path) -> Path | None:
    """Return the file itself, or the only torch.save file of a folder that can be a model."""
    if path.is_file():
        return path if _is_torch_file(path) else None
    try:
        names = [p for p in path.iterdir() if p.suffix in _SUFFIXES and not _OTHER.search(p.name)]
    except OSError:
        return None
    found = [p for p in names if p.is_file() and _is_torch_file(p)]
    if len(found) > 1:  # a trainer's own state lies beside it (OLMo)
        found = [p for p in found if p.stem == "model"]
    return found[0] if len(found) == 1 else None


def _is_torch_file(path: Path) -> bool:
    try:
        with open_file(path) as file:
            start = file.read(512)
    except OSError:
        return False
    return is_legacy(start) or (start[:4] == b"PK\x03\x04" and b"/data.pkl" in start[:400])


def open_torch_save(path: Path, options: OpenOptions) -> Checkpoint:
    """Open one file.

    Raises:
        FormatError: damaged file, or no tensors in it.
        UnsupportedError: TorchScript, whole pickled modules without a state dict, rank files of
            sharded saves.
    """
    root = open_torch_file(path).root
    tree: Mapping[object, object]
    if isinstance(root, dict):
        tree = root
    elif isinstance(root, Record) and (modules := module_state(root)):
        tree = modules
    else:
        raise FormatError(f"{path}: holds {_what(root)}, not a state dict")
    tree = _with_optimizer(path, tree)
    found = examine(tree)
    sharded = [n for n, v in found.opaque.items() if is_sharded(v)]
    if sharded or (not found.weights and any(is_sharded(v) for v in found.rest.values())):
        raise UnsupportedError(
            f"{path}: is one rank's part of a sharded save (DTensor or ShardedTensor); name all "
            "rank files as <name>_rank_<r> or give their folder"
        )
    notes = []
    if isinstance(root, Record):
        notes.append(f"a whole pickled module ({root.name}), read as its parameters and buffers")
    return build_checkpoint(path, "torch_save", found, options, warnings=notes)


def module_state(module: Record, prefix: str = "", depth: int = 0) -> dict[object, object]:
    """Return the state dict of a pickled ``nn.Module`` (its _parameters, _buffers, _modules)."""
    found: dict[object, object] = {}
    if depth > 64:
        return found
    for group in ("_parameters", "_buffers"):
        part = module.get(group)
        hidden = module.get("_non_persistent_buffers_set")
        for name, value in part.items() if isinstance(part, dict) else ():
            if type(value) is StoredTensor and not (isinstance(hidden, set) and name in hidden):
                found[f"{prefix}{name}"] = value
    children = module.get("_modules")
    for name, child in children.items() if isinstance(children, dict) else ():
        if type(child) is Record:
            found |= module_state(child, f"{prefix}{name}.", depth + 1)
    return found


def _with_optimizer(path: Path, tree: Mapping[object, object]) -> Mapping[object, object]:
    """Add the optimizer that lies beside the file, when the file has none of its own."""
    if any(isinstance(k, str) and k.lower().startswith("optim") for k in tree):
        return tree
    for name in _OPTIMIZERS:
        beside = path.with_name(name)
        if beside != path and beside.is_file() and _is_torch_file(beside):
            root = open_torch_file(beside).root
            if isinstance(root, dict) and "state" in root:
                return {"model": tree, "optimizer": root}
    return tree


def _what(root: object) -> str:
    if type(root) is StoredTensor:
        return f"a single tensor {list(root.shape)}"
    return f"an object of {root.name[:200]}" if type(root) is Record else f"a {type(root).__name__}"


FORMAT = Format("torch_save", "torch.save file", detect, open_torch_save, rank=90)
