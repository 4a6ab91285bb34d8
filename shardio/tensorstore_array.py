"""Arrays that the optional package ``tensorstore`` reads: OCDBT and zarr3 of Orbax.

OCDBT is a database in its own compressed B-tree format; tensorstore is its only implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, UnsupportedError
from .box import Box
from .tensor import LazyTensor


class TensorStoreArray(LazyTensor):
    """One array; regions are read through the package."""

    __slots__ = ("_folder", "_store")

    def __init__(self, folder: Path, store: Any) -> None:
        super().__init__(store.shape, store.dtype.numpy_dtype)
        self._folder = folder
        self._store = store

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Read a region. Raises FormatError when the package cannot."""
        region = tuple(slice(a, b) for a, b in zip(*box, strict=True))
        try:
            out[...] = self._store[region].read().result()
        except (ValueError, OSError) as e:
            raise FormatError(f"{self._folder}: {e}") from e

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """Which bytes they are only the package knows: the manifest stands for them."""
        manifest = self._folder / "manifest.ocdbt"
        if manifest.is_file():
            yield manifest, 0, manifest.stat().st_size


def open_store(folder: Path, name: str, *, ocdbt: bool, zarr3: bool) -> TensorStoreArray:
    """Open one array of an Orbax folder.

    Raises:
        UnsupportedError: the package is not installed.
        FormatError: it cannot open the array.
    """
    try:
        tensorstore = import_module("tensorstore")
    except ImportError as e:
        kind = "OCDBT" if ocdbt else "zarr3"
        raise UnsupportedError(
            f"{folder}: is an Orbax checkpoint in {kind} form, which needs the package "
            "tensorstore: pip install tensorstore (or save with use_ocdbt=False, use_zarr3=False)"
        ) from e
    base = f"file://{folder.resolve()}/"
    store: dict[str, object] = {"driver": "zarr3" if zarr3 else "zarr"}
    if ocdbt:
        store["kvstore"] = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    else:
        store["kvstore"] = f"{base}{name}/"
    try:
        return TensorStoreArray(folder, tensorstore.open(store, open=True, read=True).result())
    except (ValueError, OSError) as e:
        raise FormatError(f"{folder}: {name}: {e}") from e
