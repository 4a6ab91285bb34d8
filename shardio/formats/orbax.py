"""Orbax checkpoints of JAX: one zarr array per parameter, or OCDBT.

``_METADATA`` lists the tree. Plain zarr is read natively (zstd with the package ``zstandard``);
OCDBT and zarr3 through the optional package ``tensorstore``. Kernels stay [in, out] as JAX has
them (see ``convert/naming``: MaxText, Gemma...). Keys may hold slashes (flat Gemma checkpoints).
Source: orbax ``checkpoint/_src/{handlers,serialization,metadata}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import FormatError, counted
from ..assets import load_json
from ..checkpoint import Checkpoint
from ..coverage import prove
from ..jax_worlds import jax_world_of
from ..layout import Layout
from ..megatron.zarr import ARRAY, open_array
from ..packed_file import unpack_chunk
from ..registry import Format, OpenOptions
from ..state_checkpoint import model_files
from ..tensor import LazyTensor
from ..tensorstore_array import open_store

_TREE = "_METADATA"
_ITEMS = ("", "default", "items", "params", "state", "model_params")
_UNFINISHED = ".orbax-checkpoint-tmp"
_MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}
_COUNTERS = ("step", "global_step")


def detect(path: Path) -> Path | None:
    """Return the folder of the item with the tree."""
    if path.is_file():
        return path.parent if path.name == _TREE and _is_item(path.parent) else None
    return next((path / i for i in _ITEMS if _is_item(path / i)), None)


def _is_item(folder: Path) -> bool:
    if not (folder / _TREE).is_file():
        return False
    marks = ("_sharding", "_CHECKPOINT_METADATA", "manifest.ocdbt", "array_metadatas")
    return any((folder / m).exists() for m in (*marks, "../_CHECKPOINT_METADATA"))


def open_orbax(root: Path, options: OpenOptions) -> Checkpoint:
    """Open the folder of an item.

    Raises:
        FormatError: an unfinished save, missing arrays or chunks.
        UnsupportedError: OCDBT or zarr3 without ``tensorstore``, zstd without ``zstandard``.
    """
    for part in (root, root.parent):
        if _UNFINISHED in part.name:
            raise FormatError(f"{part}: the save did not finish (its name has {_UNFINISHED})")
    tree = load_json(root / _TREE)
    names = _names(root, tree)
    ocdbt, zarr3 = bool(tree.get("use_ocdbt")), bool(tree.get("use_zarr3"))
    arrays: dict[str, LazyTensor] = {}
    for name in names:
        shown = name.replace("/", ".")
        if ocdbt or zarr3:
            arrays[shown] = open_store(root, name, ocdbt=ocdbt, zarr3=zarr3)
        elif (root / name / ARRAY).is_file():
            arrays[shown] = open_array(root / name, unpack_chunk)
        else:
            raise FormatError(f"{root}: the array {name!r} of {_TREE} is missing")
    weights, optimizer, rest = _sorted(arrays)
    if not weights:
        raise FormatError(f"{root}: holds no arrays that could be model weights")
    prove(weights, root)
    for state, tensors in optimizer.items():
        prove(tensors, f"{root}: optimizer state {state}")
    notes = []
    if rest:
        notes.append(f"left out: {counted(len(rest), 'array')} (counters, schedules): {rest[0]}")
    config, assets = model_files(root, options)
    return Checkpoint(
        path=root,
        format="orbax",
        naming=jax_world_of(weights),
        weights=weights,
        optimizer=optimizer,
        step=_step(arrays),
        config=config,
        layout=Layout(format="orbax"),
        assets=assets,
        warnings=tuple(notes),
    )


def _names(root: Path, tree: Any) -> list[str]:
    """Return the array names: the keys of each leaf joined by dots."""
    entries = tree.get("tree_metadata") if isinstance(tree, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise FormatError(f"{root / _TREE}: has no tree_metadata")
    names = []
    for label, info in entries.items():
        try:
            keys = [str(k["key"]) for k in info["key_metadata"]]
            value: Mapping[str, Any] = info["value_metadata"]
            if value.get("value_type") in ("None", "Dict", "List", "Empty") or not keys:
                continue
        except (KeyError, TypeError, AttributeError) as e:
            raise FormatError(f"{root / _TREE}: {label[:80]} is malformed ({e})") from e
        name = ".".join(keys)
        if any(part.startswith(".") or not part for part in name.split("/")):
            raise FormatError(f"{root / _TREE}: {name[:80]!r} is no name of an array")
        names.append(name)
    return names


def _sorted(
    arrays: Mapping[str, LazyTensor],
) -> tuple[dict[str, LazyTensor], dict[str, dict[str, LazyTensor]], list[str]]:
    """Tell weights from optax states (``opt_state...mu.<parameter>``) and counters."""
    states = [n for n in arrays if n.split(".")[0].startswith("opt")]
    counters = [n for n in arrays if arrays[n].shape == () and n.rpartition(".")[2] in _COUNTERS]
    weights = {n: t for n, t in arrays.items() if n not in states and n not in counters}
    optimizer: dict[str, dict[str, LazyTensor]] = {}
    rest = list(counters)
    for name in states:
        words = name.split(".")
        moment = next((w for w in words if w in _MOMENTS), None)
        tail = ".".join(words[words.index(moment) + 1 :]) if moment else ""
        places = (tail, f"params.{tail}", tail.removeprefix("params."))
        owner = next((n for n in places if n in weights), None)
        if owner is None or moment is None:
            rest.append(name)
            continue
        optimizer.setdefault(_MOMENTS[moment], {})[owner] = arrays[name]
    return weights, optimizer, rest


def _step(arrays: Mapping[str, LazyTensor]) -> int | None:
    for name in _COUNTERS:
        tensor = arrays.get(name)
        if tensor is not None and tensor.shape == () and tensor.dtype.kind in "iu":
            return int(tensor.read().item())
    return None


FORMAT = Format("orbax", "Orbax (JAX)", detect, open_orbax, rank=55)
