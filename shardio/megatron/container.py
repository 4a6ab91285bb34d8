"""The three containers of Megatron's distributed checkpoints, seen as one: keys and common state.

``torch_dist``: PyTorch DCP plus ``metadata.json``; ``common.pt`` until core 0.18, since then the
item ``common_state``. ``zarr``: one folder per key. ``torch_dcp`` (torch FSDP2) and
``fsdp_dtensor``: plain DCP with keys ``model.*`` and the common entries as items of their own.
Source: ``megatron/core/dist_checkpointing/strategies`` and ``megatron/training/checkpointing.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FormatError, UnsupportedError
from ..assets import load_json
from ..chunked import Chunked
from ..dcp_folder import DcpFolder
from ..dcp_items import read_object
from ..dcp_metadata import METADATA, Item
from ..records import Record
from ..torchfile import open_torch_file
from .fsdp_dtensor import usual_keys
from .names import is_ignored
from .zarr import open_array, zarr_keys

MARK = "metadata.json"
COMMON = "common.pt"
_COMMON_ITEM = "common_state/shard_0_1"
_THREADS = 8
_SINGLES = ("args", "iteration", "checkpoint_version", "opt_param_scheduler", "optimizer")


@dataclass(frozen=True, slots=True)
class Container:
    """What a distributed checkpoint holds.

    Attributes:
        backend: ``torch_dist``, ``zarr`` or ``torch_dcp``.
        tensors: by saved key, without extra states.
        common: args, iteration, schedules as unpickled.
        objects: keys of other pickled objects, each with a function that reads it.
        warnings: what a user should know.
    """

    backend: str
    tensors: Mapping[str, Chunked]
    common: Mapping[str, object]
    objects: Mapping[str, Callable[[], object]]
    warnings: tuple[str, ...] = ()


def backend_of(folder: Path) -> str | None:
    """Return the container's name by the marks it carries, None for other folders."""
    if (folder / MARK).is_file():
        try:
            mark = load_json(folder / MARK)
        except ConfigError:
            mark = None
        backend = mark.get("sharded_backend") if isinstance(mark, dict) else None
        if isinstance(backend, str):
            return backend
    if (folder / COMMON).is_file() and (folder / METADATA).is_file():
        return "torch_dist"
    return None


def open_container(folder: Path, backend: str) -> Container:
    """Open the container; reads metadata and the common state.

    Raises:
        FormatError: missing, short, swapped or damaged files.
        UnsupportedError: an unknown backend.
    """
    if backend == "zarr":
        return _zarr(folder)
    if backend in ("torch_dist", "torch_dcp"):
        return _dcp(folder, backend)
    raise UnsupportedError(
        f"{folder / MARK}: sharded_backend {backend!r} is unknown; mconv reads torch_dist and zarr"
    )


def _dcp(folder: Path, backend: str) -> Container:
    dcp = DcpFolder(folder)
    items = dcp.metadata.objects

    def reader(item: Item) -> Callable[[], object]:
        return lambda: read_object(folder, item)

    objects = {key: reader(item) for key, item in items.items() if not is_ignored(key)}
    common = _common(folder)
    if _COMMON_ITEM in objects:
        common |= _as_dict(_only(objects.pop(_COMMON_ITEM)()))
    if backend == "torch_dcp":
        common |= {key: objects.pop(key)() for key in _SINGLES if key in objects}
    tensors = {key: dcp.tensor(key) for key in dcp.metadata.tensors if not is_ignored(key)}
    if backend == "torch_dcp":
        tensors = usual_keys(tensors, folder)
    return Container(backend, tensors, common, objects, tuple(dcp.notes))


def _zarr(folder: Path) -> Container:
    keys = [p for p in zarr_keys(folder) if not is_ignored(p.name)]
    if not keys:
        raise FormatError(f"{folder}: {MARK} says zarr, but there are no array folders")
    with ThreadPoolExecutor(_THREADS) as pool:
        tensors = dict(zip((p.name for p in keys), pool.map(open_array, keys), strict=True))
    return Container("zarr", tensors, _common(folder), {})


def _common(folder: Path) -> dict[str, object]:
    path = folder / COMMON
    return _as_dict(open_torch_file(path).root) if path.is_file() else {}


def _as_dict(value: object) -> dict[str, object]:
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}


def _only(value: object) -> object:
    """ShardedObjects are saved as lists of one element."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def object_of(container: Container, key: str) -> Any:
    """Return a pickled object as the unpickler gives it, unwrapped; None when it is not there."""
    make = container.objects.get(key)
    value = _only(make()) if make is not None else None
    return value.fields if isinstance(value, Record) else value
