"""Orbax: plain zarr natively, OCDBT through tensorstore where it is installed, broken folders."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from mconv.errors import FormatError, MconvError, UnsupportedError
from mconv.shardio.registry import open_checkpoint

from .torch_cases import assert_equals_truth, cut, load_truth, writable_copy

zstd = pytest.mark.skipif(not importlib.util.find_spec("zstandard"), reason="needs zstandard")
stored = pytest.mark.skipif(not importlib.util.find_spec("tensorstore"), reason="needs tensorstore")


@pytest.mark.parametrize(
    "case", [pytest.param("orbax_zarr", marks=zstd), pytest.param("orbax_ocdbt", marks=stored)]
)
def test_equals_truth(fixtures_dir: Path, case: str) -> None:
    folder = fixtures_dir / "orbax" / case
    checkpoint = open_checkpoint(folder / "ckpt")
    assert (checkpoint.format, checkpoint.naming) == ("orbax", "jax")
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))


def test_ocdbt_without_tensorstore(fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(UnsupportedError, match="pip install tensorstore"):
        open_checkpoint(fixtures_dir / "orbax" / "orbax_ocdbt" / "ckpt")


def test_zstd_without_zstandard(fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UnsupportedError, match="zstandard"):
        open_checkpoint(fixtures_dir / "orbax" / "orbax_zarr" / "ckpt")


@pytest.fixture
def copy(fixtures_dir: Path, tmp_path: Path) -> Path:
    return writable_copy(fixtures_dir / "orbax/orbax_zarr/ckpt", tmp_path / "7" / "default")


@zstd
def test_step_folder(copy: Path) -> None:
    assert open_checkpoint(copy.parent).path == copy


@zstd
def test_missing_chunk(copy: Path) -> None:
    (copy / "params.lm_head.kernel" / "1.0").unlink()
    with pytest.raises(FormatError, match=r"lm_head\.kernel.1\.0"):
        open_checkpoint(copy)


@zstd
def test_missing_array(copy: Path) -> None:
    (copy / "params.norm.scale" / ".zarray").unlink()
    with pytest.raises(FormatError, match=r"params\.norm\.scale"):
        open_checkpoint(copy)


@zstd
def test_damaged_chunk(copy: Path) -> None:
    cut(copy / "params.lm_head.kernel" / "1.0", 8)
    checkpoint = open_checkpoint(copy)
    with pytest.raises(FormatError, match=r"1\.0"):
        checkpoint.weights["params.lm_head.kernel"].read()


@zstd
def test_lying_chunk_shape(copy: Path) -> None:
    path = copy / "params.lm_head.kernel" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chunks": [64, 160]}))
    with pytest.raises(MconvError):
        open_checkpoint(copy).weights["params.lm_head.kernel"].read()


def test_unfinished(copy: Path) -> None:
    tmp = copy.rename(copy.with_name("default.orbax-checkpoint-tmp-3"))
    with pytest.raises(FormatError, match="did not finish"):
        open_checkpoint(tmp)


def test_hostile_names(copy: Path) -> None:
    tree = json.loads((copy / "_METADATA").read_text())
    entry = next(iter(tree["tree_metadata"].values()))
    entry["key_metadata"] = [{"key": "../../etc"}]
    (copy / "_METADATA").write_text(json.dumps(tree))
    with pytest.raises(FormatError, match="no name of an array"):
        open_checkpoint(copy)
