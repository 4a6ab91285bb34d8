"""Megatron-LM's distributed formats (torch_dist, zarr, torch_dcp): fixtures against the truth, key
layouts that no fixture has, and broken checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from mconv.convert.naming import to_hf
from mconv.errors import FormatError, LayoutError, MconvError
from mconv.shardio.megatron.stacked import unstack
from mconv.shardio.placement import Fused, Shard
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.tensor import LazyTensor, from_array

from .megatron_cases import Bomb, check_truth, copy_of, values

CASES = [
    *(
        (case, "torch_dist")
        for case in (
            "core019_llama_tied_tp2pp2",
            "deepseek_tp2ep2",
            "gpt2_tp2pp2",
            "llama_tied_tp2pp2",
            "llama_tp1pp1",
            "llama_tp2pp2",
            "llama_tp2pp2_vpp2",
            "llama_tp4_gqa2",
            "mixtral_ep2",
            "mixtral_grouped_tp2ep2",
            "mixtral_tp2ep2_etp1",
            "opt_dist_tp2dp2",
            "qwen2_bias_tp2",
            "qwen3moe_tp2ep2pp2",
        )
    ),
    ("zarr_llama_tp2pp2", "zarr"),
    ("fsdp2_dp2_torchdcp", "torch_dcp"),
]
QKV = "self_attention.linear_qkv.weight"


@pytest.fixture
def base(fixtures_dir: Path) -> Path:
    return fixtures_dir / "megatron"


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies a fixture; returns its iteration folder."""

    def copy(case: str, kind: str = "torch_dist") -> Path:
        return copy_of(base / case, kind, tmp_path) / "iter_0000010"

    return copy


# -- the fixtures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("derived", [False, True], ids=["config given", "config derived"])
@pytest.mark.parametrize(("case", "kind"), CASES)
def test_fixture_is_read_exactly(base: Path, case: str, kind: str, derived: bool) -> None:
    ckpt = open_checkpoint(base / case / kind)
    assert (ckpt.format, ckpt.version) == ("megatron_dist", kind)
    assert not ckpt.warnings
    check_truth(replace(ckpt, config=None) if derived else ckpt, base / case)


@pytest.mark.parametrize(("case", "kind"), [c for c in CASES if c[1] == "torch_dist"])
def test_both_formats_give_the_same_checkpoint(base: Path, case: str, kind: str) -> None:
    legacy, dist = open_checkpoint(base / case / "torch"), open_checkpoint(base / case / kind)
    assert set(legacy.weights) == set(dist.weights)
    for name, tensor in legacy.weights.items():
        assert np.array_equal(tensor.read(), dist.weights[name].read()), name
    assert (legacy.tied, legacy.step) == (dist.tied, dist.step)
    assert legacy.layout.sizes() == dist.layout.sizes()


@pytest.mark.parametrize(("case", "kind"), [("core019_llama_tied_tp2pp2", "torch_dist"), CASES[-2]])
def test_opening_imports_no_framework(base: Path, case: str, kind: str) -> None:
    code = (
        "import sys; from mconv.shardio.registry import open_checkpoint; "
        f"c = open_checkpoint({str(base / case / kind)!r}); "
        "[t.read() for t in c.weights.values()]; "
        "bad = {'torch', 'megatron', 'transformers', 'zarr'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_paths_that_people_type(base: Path) -> None:
    for case, kind, inside in (("llama_tp2pp2", "torch_dist", "__0_0.distcp"), (*CASES[-2], None)):
        iteration = base / case / kind / "iter_0000010"
        for path in (base / case / kind, iteration, iteration / (inside or "metadata.json")):
            assert open_checkpoint(path).path == iteration


# -- keys that no fixture has ----------------------------------------------------------------------


def lazy(tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {n: from_array(t.numpy()) for n, t in tensors.items()}


def test_singleton_keys() -> None:
    """One key per layer and expert, gate and up apart (singleton_local_shards)."""
    gate, up = torch.randn(4, 8), torch.randn(4, 8)
    at = "decoder.layers.3.mlp.experts"
    found = unstack(
        lazy(
            {
                f"module.{at}.experts.2.linear_fc1.weight_v": up,
                f"module.{at}.experts.2.linear_fc1.weight_w": gate,
                "module.decoder.layers.3.mlp.linear_fc1.layer_norm_weight": torch.ones(8),
            }
        ),
        None,
    )
    name = f"{at}.local_experts.2.linear_fc1.weight"
    assert set(found) == {"decoder.layers.3.pre_mlp_layernorm.weight", name}
    assert np.array_equal(values(found[name]), torch.cat([gate, up]).numpy())


def test_mamba_parts_are_joined_in_order() -> None:
    parts = {p: torch.randn(k + 1, 3) for k, p in enumerate(("dt", "B", "x", "z", "C"))}
    prefix = "decoder.layers.mixer.in_proj.weight"
    found = unstack(lazy({f"{prefix}.{p}": torch.stack([t, -t]) for p, t in parts.items()}), 2)
    expected = torch.cat([parts[p] for p in ("z", "x", "B", "C", "dt")]).numpy()
    assert np.array_equal(values(found["decoder.layers.0.mixer.in_proj.weight"]), expected)
    assert np.array_equal(values(found["decoder.layers.1.mixer.in_proj.weight"]), -expected)


@pytest.mark.parametrize(
    ("keys", "layers", "error", "says"),
    [
        ({"decoder.layers.a.weight": (3, 2)}, 2, LayoutError, "expected 2 layers"),
        (
            {"decoder.layers.a.weight": (3,), "decoder.layers.b.weight": (2,)},
            None,
            LayoutError,
            "3",
        ),
        ({"decoder.layers.0.mlp.linear_fc1.weight_w": (3, 2)}, 1, FormatError, "missing"),
        (
            {
                "decoder.layers.0.input_layernorm.weight": (2,),
                "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (1, 2),
            },
            1,
            FormatError,
            "another key",
        ),
    ],
)
def test_contradicting_keys_are_refused(
    keys: dict[str, tuple[int, ...]], layers: int | None, error: type[MconvError], says: str
) -> None:
    with pytest.raises(error, match=says):
        unstack(lazy({k: torch.zeros(*shape) for k, shape in keys.items()}), layers)


def write_dist(folder: Path, state: dict[str, object], args: Mapping[str, object]) -> Path:
    """A torch_dist folder made by torch's own DCP writer, as Megatron lays it out."""
    root = folder / "iter_0000005"
    dcp.save(state, checkpoint_id=root, no_dist=True)
    (root / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    common = {"args": argparse.Namespace(**args), "iteration": 5, "optimizer": {}}
    torch.save(common, root / "common.pt")
    return root


def stacked_model(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding.word_embeddings.weight": (16, 8),
        "decoder.layers.self_attention.linear_qkv.weight": (2, 24, 8),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 8),
        "decoder.final_layernorm.weight": (8,),
    }
    return {k: torch.randn(*s, generator=g) for k, s in shapes.items()}


@pytest.mark.parametrize("master", ["param", "fp32_param"])
def test_optimizer_states_by_key(tmp_path: Path, master: str) -> None:
    """Plain mixed precision and the fully reshardable distributed optimizer."""
    model, moments = stacked_model(), stacked_model(1)
    state: dict[str, object] = {k: t.bfloat16() for k, t in model.items()}
    state |= {f"optimizer.state.{master}.{k}": t for k, t in model.items()}
    state |= {f"optimizer.state.exp_avg.{k}": t for k, t in moments.items()}
    ckpt = open_checkpoint(write_dist(tmp_path, state, {"num_layers": 2}))
    assert set(ckpt.optimizer) == {"master", "exp_avg"}
    name = f"decoder.layers.1.{QKV}"
    key = "decoder.layers.self_attention.linear_qkv.weight"
    assert np.array_equal(values(ckpt.optimizer["master"][name]), model[key][1].numpy())
    assert np.array_equal(values(ckpt.optimizer["exp_avg"][name]), moments[key][1].numpy())
    assert set(ckpt.optimizer["exp_avg"]) == set(ckpt.weights)


def test_flattened_optimizer_states_are_left_out(tmp_path: Path) -> None:
    model = stacked_model()
    flat = {f"optimizer.state.exp_avg.{k}": t.flatten(1) for k, t in model.items() if t.ndim == 3}
    ckpt = open_checkpoint(write_dist(tmp_path, {**model, **flat}, {"num_layers": 2}))
    assert not ckpt.optimizer
    assert "flattened" in ckpt.warnings[0]
    assert len(ckpt.weights) == 6


def test_checkpoint_without_args_asks_for_a_config(tmp_path: Path) -> None:
    root = write_dist(tmp_path, dict(stacked_model()), {})
    (root / "common.pt").unlink()
    ckpt = open_checkpoint(root)
    assert any("--config" in w for w in ckpt.warnings)
    with pytest.raises(MconvError, match="--config"):
        to_hf(replace(ckpt, weights=dict(ckpt.weights)), model_type="llama")


# -- broken checkpoints ----------------------------------------------------------------------------


def test_missing_file_is_named(copied: Callable[..., Path]) -> None:
    root = copied("llama_tp2pp2")
    (root / "__2_0.distcp").unlink()
    with pytest.raises(FormatError, match=r"__2_0\.distcp"):
        open_checkpoint(root)


@pytest.mark.parametrize("keep", [0, 1000, -1])
def test_truncated_file_is_refused(copied: Callable[..., Path], keep: int) -> None:
    root = copied("llama_tp2pp2")
    path = root / "__1_0.distcp"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    with pytest.raises(FormatError, match=r"__1_0\.distcp"):
        open_checkpoint(root)


def test_swapped_files_are_refused(copied: Callable[..., Path]) -> None:
    root = copied("llama_tp2pp2")
    sizes = {p.name: p.stat().st_size for p in root.glob("*.distcp")}
    a, b = "__0_0.distcp", min((n for n in sizes if n != "__0_0.distcp"), key=sizes.__getitem__)
    (root / a).rename(root / "aside")
    (root / b).rename(root / a)
    (root / "aside").rename(root / b)
    with pytest.raises(FormatError):
        for tensor in open_checkpoint(root).weights.values():
            tensor.read()


def test_lost_metadata_is_explained(copied: Callable[..., Path]) -> None:
    root = copied("llama_tp2pp2")
    (root / ".metadata").unlink()
    with pytest.raises(FormatError, match="did not finish"):
        open_checkpoint(root)


def test_damaged_metadata_never_crashes(copied: Callable[..., Path]) -> None:
    root = copied("llama_tied_tp2pp2")
    path = root / ".metadata"
    good = path.read_bytes()
    noise = random.Random(5)
    for k in range(40):
        bad = bytearray(good)
        if k % 4 == 0:
            del bad[noise.randrange(len(bad)) :]
        for _ in range(3):
            if bad:
                bad[noise.randrange(len(bad))] = noise.randrange(256)
        path.write_bytes(bytes(bad))
        try:
            ckpt = open_checkpoint(root)
            for tensor in ckpt.weights.values():
                tensor.read()
        except MconvError:
            continue


@pytest.mark.parametrize("victim", ["common.pt", ".metadata"])
def test_hostile_pickle_does_not_run(
    copied: Callable[..., Path], tmp_path: Path, victim: str
) -> None:
    root = copied("llama_tp1pp1")
    proof = tmp_path / "ran"
    bomb = Bomb(f"touch {proof}")
    if victim == "common.pt":
        torch.save({"args": bomb}, root / victim)
        assert open_checkpoint(root).args == {}
    else:
        (root / victim).write_bytes(pickle.dumps(bomb))
        with pytest.raises(FormatError):
            open_checkpoint(root)
    assert not proof.exists()


def test_missing_and_short_zarr_chunks(copied: Callable[..., Path]) -> None:
    root = copied("zarr_llama_tp2pp2", "zarr")
    chunk = root / "output_layer.weight" / "1.0"
    os.truncate(chunk, 100)
    with pytest.raises(FormatError, match="100 bytes"):
        open_checkpoint(root)
    chunk.unlink()
    with pytest.raises(FormatError, match=r"output_layer\.weight/1\.0"):
        open_checkpoint(root)


def test_lost_zarr_array_is_missed_by_name(copied: Callable[..., Path]) -> None:
    root = copied("zarr_llama_tp2pp2", "zarr")
    shutil.rmtree(root / f"decoder.layers.{QKV}")
    with pytest.raises(MconvError, match="attention QKV of layer 0"):
        to_hf(open_checkpoint(root), vocab_size=317, model_type="llama")


def test_fused_and_plain_cuts_differ() -> None:
    """The wrong merge of a gated MLP has the right shape: it must not be the one in use."""
    whole = from_array(np.arange(8, dtype=np.float32).reshape(8, 1))
    right, wrong = Fused(0, (4, 4)), Shard(0)
    parts = [right.cut(whole, r, 2) for r in range(2)]
    assert not np.array_equal(wrong.assemble(parts).read(), whole.read())
    assert np.array_equal(right.assemble(parts).read(), whole.read())
