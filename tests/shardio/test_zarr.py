"""Arrays in zarr's plain form, of element types that zarr itself lacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mconv.errors import UnsupportedError
from mconv.shardio import dtypes
from mconv.shardio.megatron.zarr import open_array


def array(folder: Path, values: np.ndarray, name: str) -> Path:
    size = [*values.shape]
    meta = {"shape": size, "chunks": size, "dtype": name, "order": "C", "filters": None}
    (folder / ".zarray").write_text(json.dumps({**meta, "compressor": None, "zarr_format": 2}))
    (folder / ".".join("0" for _ in size)).write_bytes(values.tobytes())
    return folder


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "<f4", "|b1"])
def test_element_types(tmp_path: Path, name: str) -> None:
    dtype = dtypes.parse(name) if name[0] in "bf" else np.dtype(name)
    values = np.array([[0, 1, 2], [-1, 0.5, 4]]).astype(dtype)
    found = open_array(array(tmp_path, values, name))
    assert found.dtype == dtype and np.array_equal(found.read(), values)


@pytest.mark.parametrize("name", [">f4", "float8_e9m9", "<c8", "|O", "nonsense"])
def test_others_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedError):
        open_array(array(tmp_path, np.zeros((2, 2), np.float32), name))
