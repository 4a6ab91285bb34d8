"""Rank files with DTensors, ShardedTensors or plain tensors: fixtures, cuts, broken folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mconv.errors import FormatError, LayoutError, UnsupportedError
from mconv.shardio.chunk_union import unite
from mconv.shardio.coverage import prove
from mconv.shardio.dtensor import local_part
from mconv.shardio.records import Record, Storage, StoredTensor
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.source import FileSource

from .torch_cases import assert_equals_truth, cut, load_truth, swap, writable_copy

CASES = ["dtensor_ranksave_2x2", "fsdp1_sharded_ranksave_2r"]
RANK_FILE = "model_world_size_4_rank_{}.pt"


@pytest.mark.parametrize("case", CASES)
def test_equals_truth(fixtures_dir: Path, case: str) -> None:
    folder = fixtures_dir / "torch" / case
    checkpoint = open_checkpoint(folder / "ckpt")
    assert checkpoint.format == "torch_ranks"
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))


def test_accelerate_rank_files(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "torch" / "accelerate_fsdp2_2r"
    checkpoint = open_checkpoint(folder / "ckpt_rankfiles")
    truth = load_truth(folder / "truth.safetensors")
    weights = {n: t for n, t in truth.items() if not n.startswith("exp_avg")}
    assert_equals_truth(checkpoint, weights)


def test_replicas_layout_and_step(fixtures_dir: Path) -> None:
    checkpoint = open_checkpoint(fixtures_dir / "torch" / "dtensor_ranksave_2x2" / "ckpt")
    assert (checkpoint.layout.tp, checkpoint.layout.dp, checkpoint.step) == (2, 2, 3)
    copies = checkpoint.replicas["model.norm.weight"]
    assert np.array_equal(copies[0].read(), checkpoint.weights["model.norm.weight"].read())
    (group,) = checkpoint.scalars["param_groups"]
    assert sorted(group["params"]) == sorted(checkpoint.weights)


# -- cuts -----------------------------------------------------------------------------------------


def _record(name: str, **state: Any) -> Record:
    record = Record(f"torch.distributed.tensor.{name}")
    record.state = state
    return record


def _stored(path: Path, offset: int, array: np.ndarray) -> StoredTensor:
    storage = Storage("0", array.dtype, array.nbytes, offset, path)
    strides = tuple(s // array.itemsize for s in np.empty(array.shape, array.dtype).strides)
    return StoredTensor(array.dtype, array.shape, strides, 0, storage)


def _dtensor(
    local: StoredTensor,
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    at: tuple[int, ...],
    cuts: Any,
) -> Record:
    axes = tuple(_record("_FlatLayout", shape=(n,)) for n in sizes)
    mesh = _record("DeviceMesh", _layout=_record("_MeshLayout", axes=axes), _coordinate_on_dim=at)
    meta = Record("torch.distributed.tensor.TensorMeta", (shape, None, None))
    spec = _record("DTensorSpec", mesh=mesh, placements=cuts, tensor_meta=meta, shard_order=None)
    return _record("DTensor", _local_tensor=local, _spec=spec)


def _chunk(array: np.ndarray, dim: int, index: int, count: int) -> np.ndarray:
    """What torch.chunk gives, with empty pieces at the end."""
    step = -(-array.shape[dim] // count)
    return array.take(
        range(min(index * step, array.shape[dim]), min((index + 1) * step, array.shape[dim])), dim
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(0, 13),
    columns=st.integers(1, 5),
    dp=st.integers(1, 4),
    tp=st.integers(1, 4),
    kind=st.sampled_from(["strided", "both", "rows", "columns"]),
)
def test_fsdp_times_tp(
    tmp_path: Path, rows: int, columns: int, dp: int, tp: int, kind: str
) -> None:
    """Cut as FSDP2 does (what tensor parallelism left, on dim 0), uneven sizes too."""
    whole = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    replicate = _record("Replicate")
    cuts: dict[str, tuple[Any, Any]] = {
        "strided": (_record("_StridedShard", dim=0, split_factor=tp), _record("Shard", dim=0)),
        "both": (_record("Shard", dim=0), _record("Shard", dim=1)),
        "rows": (_record("Shard", dim=0), replicate),
        "columns": (replicate, _record("Shard", dim=-1)),
    }
    pieces, data = [], b""
    for i in range(dp):
        for j in range(tp):
            local = whole
            if kind in ("strided", "both", "columns"):
                local = _chunk(local, 0 if kind == "strided" else 1, j, tp)
            if kind != "columns":
                local = _chunk(local, 0, i, dp)
            pieces.append((local, (i, j), len(data)))
            data += local.tobytes()
    path = tmp_path / "data"
    path.write_bytes(data)
    source = FileSource.of(path)
    chunks = []
    for local, at, offset in pieces:
        record = _dtensor(_stored(path, offset, local), whole.shape, (dp, tp), at, cuts[kind])
        chunks += local_part(record, "w", source).chunks
    tensor, copies = unite(whole.shape, whole.dtype, chunks)
    prove({"w": tensor})
    for made in (tensor, *copies):
        assert np.array_equal(made.read(), whole)


def test_a_pending_sum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"\0" * 16)
    record = _dtensor(
        _stored(path, 0, np.zeros(4, np.int32)), (4,), (2,), (0,), (_record("Partial"),)
    )
    with pytest.raises(UnsupportedError, match="summed"):
        local_part(record, "w", FileSource.of(path))


def test_a_wrong_local_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"\0" * 16)
    local = _stored(path, 0, np.zeros(3, np.int32))
    record = _dtensor(local, (4,), (2,), (0,), (_record("Shard", dim=0),))
    with pytest.raises(FormatError, match="placements say"):
        local_part(record, "w", FileSource.of(path))


# -- plain rank files -----------------------------------------------------------------------------


def _stage(torch: Any, width: int) -> tuple[Any, Any]:
    layer = torch.nn.Linear(width, width)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return layer, optimizer


def test_pipeline_stages_with_numbered_optimizers(tmp_path: Path) -> None:
    """Each stage numbers its parameters from 0; equal numbers are different weights."""
    torch = pytest.importorskip("torch")
    expected = {}
    for stage in (0, 1):
        layer, optimizer = _stage(torch, 3)
        weights = {f"layers.{stage}.{n}": v for n, v in layer.state_dict().items()}
        saved = {"model": weights, "optimizer": optimizer.state_dict(), "step": 1}
        torch.save(saved, tmp_path / f"checkpoint_stage{stage}.pt")
        for i, name in enumerate(weights):
            expected[name] = optimizer.state_dict()["state"][i]["exp_avg"].numpy()
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.weights) == sorted(expected)
    for name, value in expected.items():
        assert np.array_equal(checkpoint.optimizer["exp_avg"][name].read(), value)
    (group,) = checkpoint.scalars["param_groups"]
    assert sorted(group["params"]) == sorted(expected)


def test_plain_copies_are_replicas(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for rank in range(3):
        torch.save({"a": torch.ones(2, 2)}, tmp_path / f"model_rank{rank}.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.replicas["a"]) == 2


def test_hand_cut_tensors_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for rank in range(2):
        torch.save({"a": torch.ones(2 + rank, 2)}, tmp_path / f"model_rank{rank}.pt")
    with pytest.raises(LayoutError, match="'a'"):
        open_checkpoint(tmp_path)


# -- broken folders -------------------------------------------------------------------------------


def _copy(fixtures_dir: Path, tmp_path: Path) -> Path:
    return writable_copy(fixtures_dir / "torch" / "dtensor_ranksave_2x2" / "ckpt", tmp_path / "c")


@pytest.mark.parametrize("rank", range(4))
def test_missing_rank(fixtures_dir: Path, tmp_path: Path, rank: int) -> None:
    folder = _copy(fixtures_dir, tmp_path)
    (folder / RANK_FILE.format(rank)).unlink()
    with pytest.raises(FormatError, match=f"missing: {rank}"):
        open_checkpoint(folder)


def test_missing_optimizer_rank(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = _copy(fixtures_dir, tmp_path)
    (folder / "optim_world_size_4_rank_3.pt").unlink()
    with pytest.raises(FormatError, match="missing: 3"):
        open_checkpoint(folder)


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 3)])
def test_swapped_ranks(fixtures_dir: Path, tmp_path: Path, pair: tuple[int, int]) -> None:
    folder = _copy(fixtures_dir, tmp_path)
    swap(*(folder / RANK_FILE.format(r) for r in pair))
    with pytest.raises(FormatError, match="was written by rank"):
        open_checkpoint(folder)


def test_one_byte_cut(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = _copy(fixtures_dir, tmp_path)
    cut(folder / RANK_FILE.format(2))
    with pytest.raises(FormatError, match="rank_2"):
        open_checkpoint(folder)


def test_mixed_world_sizes(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = _copy(fixtures_dir, tmp_path)
    shutil.copyfile(folder / RANK_FILE.format(0), folder / "model_world_size_2_rank_0.pt")
    with pytest.raises(FormatError, match="mixed"):
        open_checkpoint(folder)


def test_one_file_is_not_the_model(fixtures_dir: Path, tmp_path: Path) -> None:
    source = fixtures_dir / "torch" / "dtensor_ranksave_2x2" / "ckpt" / RANK_FILE.format(0)
    shutil.copyfile(source, tmp_path / "weights.pt")
    with pytest.raises(UnsupportedError, match="sharded save"):
        open_checkpoint(tmp_path / "weights.pt")
