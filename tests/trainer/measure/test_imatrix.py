"""The importance matrix: what llama-imatrix measures, the same under every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mconv.convert.gguf import open_gguf  # noqa: E402
from mconv.convert.imatrix import read_imatrix  # noqa: E402
from mconv.convert.imatrix_write import Measured, gguf_names, write_imatrix  # noqa: E402
from mconv.trainer.batch import Batch  # noqa: E402
from mconv.trainer.loop import new_run, run_steps  # noqa: E402
from mconv.trainer.measure.imatrix import Collector, ImatrixHook  # noqa: E402
from mconv.trainer.mesh import build_meshes, process_group  # noqa: E402
from mconv.trainer.settings import RunConfig  # noqa: E402
from mconv.trainer.settings.degrees import resolve  # noqa: E402
from mconv.trainer.settings.model import ModelConfig  # noqa: E402
from mconv.trainer.settings.sections import ImatrixConfig, SaveConfig, TrainConfig  # noqa: E402

from ..ranks import Ranks  # noqa: E402
from ..toys import ToyData, run_config  # noqa: E402

ORACLE = Path(__file__).parents[2] / "fixtures" / "imatrix"
CHUNKS, CHUNK = 6, 32
ALONE: dict[str, Any] = {}  # what one process measures, by model
TP = {"tp": 2, "sp": True, "loss_parallel": True}


class Fixed:
    """The oracle's chunks of text."""

    samples = CHUNKS

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = np.pad(np.array(rows, np.int64), ((0, 0), (0, 1)))

    def batch(self, step: int, batch: int, rank: int, world_size: int) -> Batch:
        part = batch // world_size
        ids = torch.from_numpy(self.rows[rank * part : (rank + 1) * part])
        positions = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
        return Batch(ids[:, :-1], ids[:, 1:], positions)


def collected(rank: int, world_size: int, store: Path, config: RunConfig, rows: Any) -> Any:
    """Measure two batches, in float64."""
    with process_group(rank, world_size, store):
        data = ToyData(config) if rows is None else Fixed(rows)
        run = new_run(config, build_meshes(resolve(config, world_size), "cpu"), data)
        collector = Collector(run)
        for step in range(2 if rows is None else 1):
            collector.measure(step)
        found = collector.result()
        hooks = [m for p in run.state.parts for m in p.modules() if m._forward_pre_hooks]
        return {n: (m.sums, m.counts) for n, m in found.items()}, len(hooks)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_equals_llama_imatrix(ranks: Ranks, kind: str) -> None:
    oracle = json.loads((ORACLE / f"{kind}.json").read_text())
    theirs = open_gguf(ORACLE / f"{kind}.gguf")
    config = replace(
        run_config(),
        model=ModelConfig(**oracle["model"]),
        train=TrainConfig(steps=1, seq_len=CHUNK, batch=CHUNKS, seed=oracle["seed"]),
    )
    mine, _ = ranks(collected, 1, config, oracle["tokens"])[0]
    names = {n.removesuffix(".counts") for n in theirs.tensors if n.endswith(".counts")}
    assert set(mine) == names
    for name, (sums, counts) in mine.items():
        np.testing.assert_array_equal(counts, theirs.array(f"{name}.counts").reshape(-1))
        expected = theirs.array(f"{name}.in_sum2").reshape(sums.shape)
        np.testing.assert_allclose(sums, expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("world", "layout", "model"),
    [
        (2, {"train": {"checkpointing": "full"}}, "tied"),
        (2, TP, "gqa"),
        (2, TP, "moe"),
        (2, {"cp": 2}, "dense"),
        (2, {"pp": 2}, "moe"),
        (2, {"ep": 2}, "moe"),
        (4, {"dp_shard": 2, **TP}, "gqa"),
    ],
)
def test_layouts_measure_the_same(
    ranks: Ranks, world: int, layout: dict[str, Any], model: str
) -> None:
    if model not in ALONE:
        ALONE[model], hooks = ranks(collected, 1, run_config(model), None)[0]
        assert hooks == 0
    expected = ALONE[model]
    settings = {k: v for k, v in layout.items() if k != "train"}
    config = run_config(model, layout.get("train"), **settings)
    for found, _ in ranks(collected, world, config, None):
        assert set(found) == set(expected)
        for name, (sums, counts) in expected.items():
            np.testing.assert_array_equal(found[name][1], counts)
            np.testing.assert_allclose(found[name][0], sums, rtol=1e-11)


def hooked(rank: int, world_size: int, store: Path, folder: Path) -> None:
    config = replace(
        run_config("gqa", {"dtype": "float32"}),
        save=SaveConfig(folder=folder),
        imatrix=ImatrixConfig(every=2, at_end=True, batches=2),
    )
    with process_group(rank, world_size, store):
        run = new_run(config, build_meshes(resolve(config, world_size), "cpu"), ToyData(config))
        run_steps(run, [ImatrixHook()])


def test_a_run_writes_what_quantize_reads(ranks: Ranks, tmp_path: Path) -> None:
    ranks(hooked, 2, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["imatrix.gguf"]
    matrix = read_imatrix(tmp_path / "imatrix.gguf")
    assert (matrix.chunks, matrix.datasets) == (24, ("none",))
    weights = matrix.weights("blk.3.ffn_down.weight", (16, 24))
    assert weights is not None
    assert (weights > 0).all()
    assert len(matrix.entries) == 4 * 7
    file = open_gguf(tmp_path / "imatrix.gguf")
    assert file.array("blk.0.attn_q.weight.counts").reshape(-1).tolist() == [24 * 8]


def test_files_are_those_of_llama_imatrix(tmp_path: Path) -> None:
    """Byte for byte, given the same sums."""
    for kind in ("llama", "qwen3_moe"):
        theirs = open_gguf(ORACLE / f"{kind}.gguf")
        names = sorted(n.removesuffix(".counts") for n in theirs.tensors if n.endswith(".counts"))
        entries = {}
        for name in names:
            counts = theirs.array(f"{name}.counts").reshape(-1)
            sums = theirs.array(f"{name}.in_sum2").reshape(len(counts), -1)
            entries[name] = Measured(sums, counts)
        path = tmp_path / f"{kind}.gguf"
        write_imatrix(
            path, entries, datasets=theirs["imatrix.datasets"], chunks=CHUNKS, chunk_size=CHUNK
        )
        assert path.read_bytes() == (ORACLE / f"{kind}.gguf").read_bytes()


def test_names_of_experts() -> None:
    names = gguf_names(run_config("moe").model.to_hf())
    assert names["model.layers.1.mlp.experts.3.up_proj.weight"] == ("blk.1.ffn_up_exps.weight", 3)
    assert names["model.layers.1.mlp.gate.weight"] == ("blk.1.ffn_gate_inp.weight", 0)
    assert names["lm_head.weight"] == ("output.weight", 0)
