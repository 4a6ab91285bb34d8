"""Checkpoints of DeepSpeed's AutoEP (experts of a Mixtral fused per rank), made by it, and what
transformers computes with the merged model.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mconv.convert.reshard import reshard
from mconv.errors import UnsupportedError
from mconv.shardio import Layout, open_checkpoint
from mconv.shardio.compare import check_replicas
from mconv.shardio.coverage import prove

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("deepspeed.module_inject.auto_ep")

FUSED = re.compile(r"\.experts\.w[123]$")
ALL = [(4, 2, 2), (2, 2, 1)] if os.environ.get("MCONV_TEST_ALL") else [(4, 2, 2)]


def train(out: Path, *numbers: int) -> Path:
    script = Path(__file__).with_name("autoep_training.py")
    done = subprocess.run(
        [sys.executable, script, out, *map(str, numbers)],
        capture_output=True,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize(("ranks", "ep", "stage"), ALL)
def test_equals_the_engine_and_transformers(
    tmp_path: Path, ranks: int, ep: int, stage: int
) -> None:
    out = train(tmp_path, ranks, ep, stage)
    ckpt = open_checkpoint(out / "ckpt")
    assert (ckpt.layout.ep, ckpt.layout.dp, ckpt.layout.zero_stage) == (ep, ranks, stage)
    seen = set()
    for rank in range(ranks):
        truth = np.load(out / f"truth_{rank}.npz")
        for key in truth:
            kind, name = key.split("/")
            table = ckpt.optimizer["master" if kind == "fp32" else kind]
            parts = {name: truth[key]}
            if FUSED.search(name):
                first = rank % ep * len(truth[key])
                parts = {f"{name}.{first + e}": t for e, t in enumerate(truth[key])}
            for n, want in parts.items():
                assert np.array_equal(table[n].read(), want), (rank, kind, n)
            seen |= parts.keys()
    assert seen == ckpt.optimizer["master"].keys() == ckpt.weights.keys()
    prove(ckpt.weights)
    check_replicas(ckpt.weights, ckpt.replicas)

    reshard(out / "ckpt", out / "hf", Layout("hf"), config=out / "config.json")
    model, info = transformers.MixtralForCausalLM.from_pretrained(
        out / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    generator = torch.Generator().manual_seed(77)
    ids = torch.randint(61, (2, 12), generator=generator)
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(json.loads((out / "loss.json").read_text()), rel=4e-3)


def edit(folder: Path, **changes: object) -> None:
    """Change the first layer's entry of ``ds_autoep_layers``."""
    path = next(folder.glob("*/mp_rank_00_model_states.pt"))
    state = torch.load(path, weights_only=False)
    state["ds_autoep_layers"][0] |= changes
    torch.save(state, path)


def test_uneven_placements_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt" / "global_step1"
    folder.mkdir(parents=True)
    ranks = [{"rank": 0, "experts": [0, 2]}, {"rank": 1, "experts": [1, 3]}]
    layer = {
        "expert_key_prefix": "model.layers.0.mlp.experts",
        "num_experts": 4,
        "num_local_experts": 2,
        "ep_size": 2,
        "expert_placement": {"ranks": ranks},
    }
    state = {
        "module": {}, "param_shapes": None, "buffer_names": [], "global_steps": 1, "ds_config": {},
        "dp_world_size": 2, "mp_world_size": 1, "ds_autoep_layers": [layer],
    }  # fmt: skip
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(UnsupportedError, match="in order and evenly"):
        open_checkpoint(folder)
    edit(folder.parent, expert_placement=None, num_experts=5)
    with pytest.raises(UnsupportedError, match="in order and evenly"):
        open_checkpoint(folder)
