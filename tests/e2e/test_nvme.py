"""A ZeRO-3 checkpoint whose optimizer was on NVMe, as DeepSpeed's own swappers leave it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mconv.convert.reshard import reshard
from mconv.shardio import Layout, open_checkpoint
from mconv.shardio.coverage import prove

pytest.importorskip("torch")
pytest.importorskip("deepspeed")


def test_swapped_states_equal_those_of_the_engine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("nvme_training.py"), tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    swapped = list(tmp_path.glob("ckpt/*/offloaded_tensors/rank0*/*.tensor.swp"))
    assert len(swapped) % 6 == 0  # masters and two moments of each sub-group on two ranks
    assert len(swapped) >= 12

    ckpt = open_checkpoint(tmp_path / "ckpt")
    truth = np.load(tmp_path / "truth.npz")
    assert {f"fp32/{n}" for n in ckpt.weights} == {k for k in truth if k.startswith("fp32/")}
    for key in truth:
        state, name = key.split("/")
        tensor = ckpt.optimizer["master" if state == "fp32" else state][name]
        assert np.array_equal(tensor.read(), truth[key]), key
    prove(ckpt.weights)

    reshard(tmp_path / "ckpt", tmp_path / "zero1", Layout("deepspeed", dp=3, zero_stage=1))
    again = open_checkpoint(tmp_path / "zero1")
    for state, tensors in again.optimizer.items():
        for name, tensor in tensors.items():
            want = truth[f"{'fp32' if state == 'master' else state}/{name}"]
            assert np.array_equal(tensor.read(), want), (state, name)
