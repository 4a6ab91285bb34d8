"""Checkpoints of Paddle and PaddleNLP against what the frameworks themselves hold.

``tests/fixtures/paddle/make.py`` trained and saved them, cut them with PaddleNLP's own rules, and
wrote the truth under Hugging Face's names.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from mconv.convert.naming import from_hf, to_hf
from mconv.errors import FormatError, UnsupportedError
from mconv.shardio.coverage import prove
from mconv.shardio.placement import Fused, Shard
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.tensor import LazyTensor
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parents[2] / "fixtures" / "paddle"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 32,
}


def truth(name: str = "truth") -> dict[str, np.ndarray]:
    return load_file(HERE / f"{name}.safetensors")


def weights_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: t for n, t in tensors.items() if not n.startswith("exp_avg")}


def equal(found: dict[str, LazyTensor], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    prove(found)
    for name, value in wanted.items():
        assert np.array_equal(found[name].read(), value), name


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("single", "truth"),
        ("single/model_state.pdparams", "truth"),
        ("protocol2.pdparams", "truth"),
        ("nested.pdparams", "truth"),
        ("tp2", "truth"),
        ("tp2/model_state.tp01.pdparams", "truth"),
        ("tp4", "truth"),
        ("fused", "truth_fused"),
        ("fused_tp2", "truth_fused"),
    ],
)
def test_weights_equal_what_paddle_holds(case: str, expected: str, config: Path) -> None:
    found = open_checkpoint(HERE / case, config=None if "/" in case else config)
    assert found.naming == "paddlenlp"
    equal(dict(to_hf(found).weights), weights_of(truth(expected)))


@pytest.mark.parametrize("case", ["single", "nested.pdparams"])
def test_moments_belong_to_their_weights(case: str, config: Path) -> None:
    found = to_hf(open_checkpoint(HERE / case, config=config))
    for state in ("exp_avg", "exp_avg_sq"):
        wanted = {
            n.removeprefix(f"{state}."): t for n, t in truth().items() if n.startswith(f"{state}.")
        }
        equal(dict(found.optimizer[state]), wanted)


def test_unified_checkpoints_have_masters_and_moments() -> None:
    found = to_hf(open_checkpoint(HERE / "unified"))
    wanted = weights_of(truth())
    assert found.version == "3.0.0b4"
    equal(dict(found.optimizer["master"]), wanted)
    half = {n: t.astype(ml_dtypes.bfloat16) for n, t in wanted.items()}
    equal(dict(found.weights), half)
    assert {t.dtype for t in found.weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert set(found.optimizer) == {"master", "exp_avg", "exp_avg_sq"}
    assert np.array_equal(
        found.optimizer["exp_avg"]["lm_head.weight"].read(), truth()["exp_avg.lm_head.weight"]
    )


def test_cuts_are_told() -> None:
    found = open_checkpoint(HERE / "fused_tp2")
    assert found.layout.tp == 2
    layer = "llama.layers.0"
    assert found.placements[f"{layer}.mlp.gate_up_fused_proj.weight"]["tp"] == Fused(1, (24, 24))
    assert found.placements[f"{layer}.self_attn.o_proj.weight"]["tp"] == Shard(0, even=True)
    assert len(found.replicas["llama.norm.weight"]) == 1


def test_key_value_heads_below_tp_are_whole_on_every_rank() -> None:
    found = open_checkpoint(HERE / "tp4")
    name = "llama.layers.1.self_attn.k_proj.weight"
    assert name not in found.placements
    assert len(found.replicas[name]) == 3


def test_names_go_back() -> None:
    for case in ("single", "fused"):
        found = open_checkpoint(HERE / case)
        back = from_hf(to_hf(found), "paddlenlp")
        again = to_hf(back)
        for name, tensor in to_hf(found).weights.items():
            assert np.array_equal(again.weights[name].read(), tensor.read()), name


def test_distributed_checkpoint_is_put_together() -> None:
    found = open_checkpoint(HERE / "distcp")
    grid = np.arange(48, dtype=np.float32).reshape(8, 6)
    assert found.format == "paddle-distcp"
    equal(
        dict(found.weights),
        {
            "rows.weight": grid,
            "columns.weight": (grid + 1).astype(ml_dtypes.bfloat16),
            "whole.weight": grid * 2,
        },
    )
    assert found.placements["rows.weight"] == {"mesh": Shard(0)}
    assert found.placements["columns.weight"] == {"mesh": Shard(1)}


def test_large_arrays_stay_in_the_file(tmp_path: Path) -> None:
    big = np.random.default_rng(1).normal(size=(700, 300)).astype(np.float32)
    arrays = {"a": big, "f": np.asfortranarray(big), "e": big.astype(">f4")}
    for protocol in (3, 4, 5):
        path = tmp_path / f"p{protocol}.pdparams"
        path.write_bytes(pickle.dumps(arrays, protocol=protocol))
        found = open_checkpoint(path)
        for name in arrays:
            spans = list(found.weights[name].spans())
            assert {p for p, _, _ in spans} == {path}
            assert np.array_equal(found.weights[name].read(), big)


def test_pieces_of_old_protocols_are_joined(tmp_path: Path) -> None:
    value = np.arange(600, dtype=np.float32)
    info = {"w": {"OriginShape": (20, 30), "slices": ["w@@.0", "w@@.1"]}}
    state = {"w@@.0": value[:256], "w@@.1": value[256:], "UnpackBigParamInfor@@": info}
    path = tmp_path / "big.pdparams"
    path.write_bytes(pickle.dumps(state, protocol=2))
    assert np.array_equal(open_checkpoint(path).weights["w"].read(), value.reshape(20, 30))
    del state["w@@.1"]
    path.write_bytes(pickle.dumps(state, protocol=2))
    with pytest.raises(FormatError, match="pieces of 'w' are missing"):
        open_checkpoint(path)


def test_larger_optimizers_beside_the_model_are_no_weights(tmp_path: Path) -> None:
    one = np.ones((2, 2), np.float32)
    states = {f"linear_0.w_0_{kind}_0": one for kind in ("moment1", "moment2", "beta1_pow_acc")}
    path = tmp_path / "all.pdparams"
    path.write_bytes(pickle.dumps({"net": {"w": one, "b": one}, "opt": states}))
    assert set(open_checkpoint(path).weights) == {"w", "b"}


def test_missing_rank_is_named(tmp_path: Path) -> None:
    shutil.copytree(HERE / "tp4", tmp_path / "run")
    (tmp_path / "run" / "model_state.tp02.pdparams").unlink()
    with pytest.raises(FormatError, match="1 of 4 rank files of model_state are missing: tp02"):
        open_checkpoint(tmp_path / "run")


def test_ranks_of_several_models_are_refused(tmp_path: Path) -> None:
    shutil.copytree(HERE / "tp2", tmp_path / "run")
    shutil.copy(HERE / "fused_tp2" / "model_state.tp01.pdparams", tmp_path / "run")
    with pytest.raises(FormatError, match="is on 1 of 2 tp ranks"):
        open_checkpoint(tmp_path / "run")


def test_unknown_cut_is_refused(tmp_path: Path) -> None:
    for rank in range(2):
        state = {"odd.thing": np.zeros((4, 4), np.float32)}
        (tmp_path / f"model_state.tp{rank:02d}.pdparams").write_bytes(pickle.dumps(state))
    with pytest.raises(UnsupportedError, match=r"how odd\.thing .* is cut over 2 tp ranks"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("end", [0, 1, 50, 3000])
def test_cut_files_are_refused(end: int, tmp_path: Path) -> None:
    data = (HERE / "single" / "model_state.pdparams").read_bytes()
    (tmp_path / "model_state.pdparams").write_bytes(data[:end])
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


def test_lost_file_of_a_distributed_save_is_named(tmp_path: Path) -> None:
    shutil.copytree(HERE / "distcp", tmp_path / "run")
    (tmp_path / "run" / "1_0.distcp").unlink()
    with pytest.raises(FormatError, match=r"1 of 2 files are missing: 1_0\.distcp"):
        open_checkpoint(tmp_path / "run")


def test_nothing_is_imported() -> None:
    code = (
        "import sys; from mconv.shardio.registry import open_checkpoint as o\n"
        f"for c in ('single','tp2','unified','distcp'): o({str(HERE)!r} + '/' + c)\n"
        "assert not {'paddle', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
