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

from ...errors import FormatError
from ..assets import load_json
from ..checkpoint import Checkpoint
from ..jax_checkpoint import jax_checkpoint
from ..megatron.zarr import ARRAY, open_array
from ..packed_file import unpack_chunk
from ..registry import Format, OpenOptions
from ..tensor import LazyTensor
from ..tensorstore_array import open_store

_TREE = "_METADATA"
_ITEMS = ("", "default", "items", "params", "state", "model_params")
_UNFINISHED = ".orbax-checkpoint-tmp"


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
    return jax_checkpoint(root, options, arrays, name="orbax")


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


FORMAT = Format("orbax", "Orbax (JAX)", detect, open_orbax, rank=55)
