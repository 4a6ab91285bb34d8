"""Checkpoints of every DeepSpeed release that is at hand, against what its live engine held.

``MCONV_TEST_DEEPSPEED`` names a folder with one folder per release, each made by
``pip install --no-deps --target 0.16.9 deepspeed==0.16.9``; without it the installed release is
tested alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mconv.shardio import Checkpoint, open_checkpoint
from mconv.shardio.coverage import prove
from mconv.shardio.tensor import from_array

pytest.importorskip("torch")
pytest.importorskip("deepspeed")

RELEASES = os.environ.get("MCONV_TEST_DEEPSPEED")
FOUND = sorted(p for p in Path(RELEASES).iterdir() if p.is_dir()) if RELEASES else []
CASES = ("zero0", "zero1", "bf16-optimizer", "zero2", "zero3")
STAGES = {"zero1": 1, "bf16-optimizer": 1, "zero2": 2, "zero3": 3}
F32 = np.dtype(np.float32)


@pytest.fixture(scope="module", params=[None, *FOUND], ids=lambda p: p.name if p else "installed")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint per case, written by one release."""
    out = tmp_path_factory.mktemp("release")
    script = Path(__file__).with_name("version_training.py")
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    if request.param is not None:
        env["PYTHONPATH"] = str(request.param)
    done = subprocess.run(
        [sys.executable, script, out, *CASES], capture_output=True, text=True, env=env, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if request.param is None:
        assert len(list(out.glob("*/truth.npz"))) == len(CASES), done.stderr[-3000:]
    return out


def check(ckpt: Checkpoint, truth: dict[str, np.ndarray]) -> None:
    states = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    for key, want in truth.items():
        kind, name = key.split("/")
        weight = ckpt.weights[name]
        if kind in ("frozen", "fp32", "weight"):
            rounded = from_array(want).cast(weight.dtype).cast(F32).read()
            assert np.array_equal(weight.cast(F32).read(), rounded), key
        table = ckpt.optimizer.get(states.get(kind, ""))
        if table is not None:
            assert np.array_equal(table[name].read(), want), key
    for tensors in (ckpt.weights, *ckpt.optimizer.values()):
        prove(tensors)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_engine(saved: Path, case: str) -> None:
    if not (saved / case / "truth.npz").exists():
        pytest.skip(f"this release does not run {case} under the installed torch")
    ckpt = open_checkpoint(saved / case / "ckpt")
    truth = dict(np.load(saved / case / "truth.npz"))
    assert ckpt.step == 2
    assert {k.split("/")[1] for k in truth} == set(ckpt.weights)
    assert ckpt.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    if case == "zero0":
        assert {"exp_avg", "exp_avg_sq"} == set(ckpt.optimizer)
    elif any((saved / case / "ckpt").glob("*/*optim_states.pt")):
        assert ckpt.layout.zero_stage == STAGES[case]
        assert {"master", "exp_avg", "exp_avg_sq"} == set(ckpt.optimizer)
    else:  # 0.17 and early 0.18 lose the states of BF16_Optimizer
        assert case == "bf16-optimizer"
        assert "no optimizer files" in " ".join(ckpt.warnings)
    check(ckpt, truth)
