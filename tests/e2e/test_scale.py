"""Large worlds: metadata stays metadata, and merging reads each byte once."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from mconv.convert.reshard import reshard
from mconv.shardio import Layout, open_checkpoint
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.chunked import Chunked
from mconv.shardio.flat_buffer import Deferred
from mconv.shardio.full_check import verify_checkpoint
from mconv.shardio.report import inspect_checkpoint
from mconv.shardio.source import FileSource, close_files
from mconv.shardio.stream import Limits
from mconv.shardio.tensor import from_array

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from make_sparse_moe import CONFIG, KINDS, shapes, write

SMALL = {
    **CONFIG, "num_hidden_layers": 5, "n_routed_experts": 8, "hidden_size": 128, "vocab_size": 640,
    "moe_intermediate_size": 64, "intermediate_size": 256, "q_lora_rank": 64, "kv_lora_rank": 32,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["hf", "dcp", "deepspeed"])
def test_a_world_of_64_ranks(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shapes(SMALL)
    write(tmp_path, KINDS[kind](model, 64))
    read = []
    inner = FileSource.readinto

    def readinto(self: FileSource, offset: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        inner(self, offset, buffer)

    monkeypatch.setattr(FileSource, "readinto", readinto)
    ckpt = open_checkpoint(tmp_path)
    report = inspect_checkpoint(ckpt)
    assert report.whole
    assert report.parameters == sum(map(prod, model.values()))
    assert sum(read) < 10_000_000  # pickles and headers, no tensors
    flat = [t for g in (ckpt.weights, *ckpt.optimizer.values()) for t in g.values()]
    if kind == "deepspeed":
        assert len(flat) == 4 * len(model)  # weights, which are the masters, and two moments
        assert report.layout == {"dp": 64, "zero_stage": 3}
        assert len(report.rank_files) == 64
        monkeypatch.undo()
        for check in (lambda: None, lambda: verify_checkpoint(ckpt)):
            check()
            for tensor in flat:  # proven without a list of its pieces, read without keeping it
                assert isinstance(tensor, Deferred)
                with pytest.raises(AttributeError):
                    object.__getattribute__(tensor, "chunks")


def read_bytes() -> int:
    """Bytes that this process has read through system calls."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("no rchar")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux only")
@pytest.mark.parametrize(
    "layout", ["dcp:dp=3", "torch", "deepspeed:zero=3,dp=3", "deepspeed:zero=1,dp=2", "hf-dcp:dp=2"]
)
def test_merging_reads_each_byte_once(tmp_path: Path, layout: str) -> None:
    """Linux counts what a process reads, ``copy_file_range`` included."""
    rng = np.random.default_rng(8)
    arrays = {f"w{k}": rng.standard_normal((1000 + k, 515), np.float32) for k in range(4)}
    made = Checkpoint(
        path=tmp_path, format="hf", weights={n: from_array(a) for n, a in arrays.items()}
    )
    reshard(made, tmp_path / "in", Layout.parse(layout))
    ckpt = open_checkpoint(tmp_path / "in")
    reshard(ckpt, tmp_path / "plan", Layout("hf"), dry_run=True)
    close_files()
    nbytes = sum(a.nbytes for a in arrays.values())
    before = read_bytes()
    reshard(ckpt, tmp_path / "out", Layout("hf"), limits=Limits(threads=2))
    spent = read_bytes() - before
    assert nbytes <= spent <= 1.02 * nbytes + 100_000
    merged = open_checkpoint(tmp_path / "out").weights
    assert {n: t.read().tobytes() for n, t in merged.items()} == {
        n: a.tobytes() for n, a in arrays.items()
    }


def test_every_piece_is_read_once(fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all weights fetches as many bytes as they have, however they are cut."""
    cases = (
        "deepspeed/z3_dp3_bf16_odd_subgroups/ckpt", "deepspeed/pp2_tp2_dp2_z1_meg/ckpt",
        "megatron/llama_tp2pp2/torch", "megatron/mixtral_tp2ep2_etp1/torch_dist",
        "torch/dcp_fsdp2_tp_2x2/ckpt", "torch/fairscale_flat_2r/ckpt",
        "nanotron/nanotron_tp2_pp2/ckpt", "tf/tf1_partitioned/ckpt",
    )  # fmt: skip
    read: list[int] = []
    inner = FileSource.readinto

    def readinto(self: FileSource, offset: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        inner(self, offset, buffer)

    for case in cases:
        ckpt = open_checkpoint(fixtures_dir / case)
        held = [t for t in ckpt.weights.values() if isinstance(t, Chunked)]
        with monkeypatch.context() as patch:
            patch.setattr(FileSource, "readinto", readinto)
            read.clear()
            for tensor in held:
                tensor.read()
        assert sum(t.nbytes for t in held) == sum(read), case
