"""Our DeepSpeed files against the ones DeepSpeed wrote: the same run, the same layout, every key.

A fixture is resharded to its own layout; the unpickled trees must then agree: keys, types, classes,
settings and tensors, except for what is known to differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv import Layout, reshard
from mconv.shardio.records import Record, StoredTensor
from mconv.shardio.torchfile import open_torch_file, read_stored

CASES = {
    "z1_dp2_bf16": "deepspeed:zero=1,dp=2",
    "z1_dp3_fp32_odd": "deepspeed:zero=1,dp=3",
    "z1_dp2_bf16_frozen": "deepspeed:zero=1,dp=2",
    "z2_dp2_fp16": "deepspeed:zero=2,dp=2",
    "z2_dp4_bf16_tied": "deepspeed:zero=2,dp=4",
    "z3_dp2_bf16": "deepspeed:zero=3,dp=2",
    "z3_dp3_bf16_odd_subgroups": "deepspeed:zero=3,dp=3",
}
# random states and the like cannot move to other ranks; config sections are ours
LEFT_OUT = {"rng", "ds_config", "random_ltd"}


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two unpickled trees differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = [f"{path}: {k} missing" for k in theirs if k not in ours and k not in LEFT_OUT]
        for key in ours:
            if key in theirs and key not in LEFT_OUT:
                found += differences(ours[key], theirs[key], f"{path}/{key}")
        return found
    if isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return [f"{path}: {len(ours)} items instead of {len(theirs)}"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [d for k, (a, b) in pairs for d in differences(a, b, f"{path}/{k}")]
    if isinstance(theirs, StoredTensor):
        return _tensors(ours, theirs, path)
    if isinstance(theirs, Record):
        if theirs.name.endswith("ZeroStageEnum"):  # ours is the plain number it stands for
            return [] if (ours,) == theirs.args else [f"{path}: {ours} instead of {theirs.args}"]
        if not isinstance(ours, Record) or ours.name != theirs.name:
            return [f"{path}: {ours} instead of {theirs.name}"]
        return differences(dict(ours.fields), dict(theirs.fields), path)
    return [] if ours == theirs else [f"{path}: {ours!r} instead of {theirs!r}"]


def _tensors(ours: Any, theirs: StoredTensor, path: str) -> list[str]:
    if theirs.shape == () and isinstance(ours, (int, float)):  # torch's Adam turns it into a tensor
        return [] if float(read_stored(theirs)) == ours else [f"{path}: step {ours}"]
    if not isinstance(ours, StoredTensor):
        return [f"{path}: {ours!r} instead of a tensor"]
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return [f"{path}: {ours.dtype} {ours.shape} instead of {theirs.dtype} {theirs.shape}"]
    a, b = read_stored(ours), read_stored(theirs)
    if a.tobytes() == b.tobytes():
        return []
    # stage 3 leaves its padding uninitialised, ours is zero
    differs = a.reshape(-1).view(np.uint8) != b.reshape(-1).view(np.uint8)
    real = a.reshape(-1)[differs.reshape(a.size, -1).any(1)]
    return [] if not real.any() else [f"{path}: values differ"]


@pytest.mark.parametrize("case", CASES)
def test_equals_deepspeeds_own_files(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    source = fixtures_dir / "deepspeed" / case / "ckpt"
    out = tmp_path / "out"
    reshard(source, out, Layout.parse(CASES[case]))
    tag = (source / "latest").read_text().strip()
    assert (out / "latest").read_text() == tag
    theirs = sorted(p.name for p in (source / tag).glob("*.pt"))
    assert sorted(p.name for p in (out / tag).glob("*.pt")) == theirs
    for name in theirs:
        ours = open_torch_file(out / tag / name).root
        found = differences(ours, open_torch_file(source / tag / name).root)
        assert found == [], name


def test_differences_are_seen(fixtures_dir: Path, tmp_path: Path) -> None:
    """The comparison itself: another number of ranks shows."""
    source = fixtures_dir / "deepspeed" / "z1_dp2_bf16" / "ckpt"
    reshard(source, tmp_path / "out", Layout.parse("deepspeed:zero=1,dp=3"))
    name = "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    ours = open_torch_file(tmp_path / "out" / name).root
    found = differences(ours, open_torch_file(source / name).root)
    assert {d.split(":")[0].split("/")[2] for d in found} >= {
        "base_optimizer_state",
        "single_partition_of_fp32_groups",
        "partition_count",
        "param_slice_mappings",
    }
