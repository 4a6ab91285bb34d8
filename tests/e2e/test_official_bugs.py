"""Where the frameworks' own converters fail or are silently wrong, mconv is right.

Each test runs the real tool where it is installed and shows what it does (so that a fixed release
is noticed), and compares what mconv writes with the ground truth of the live run.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from mconv.convert.reshard import reshard
from mconv.errors import FormatError
from mconv.shardio import Layout, open_checkpoint
from safetensors.numpy import load_file

Arrays = dict[str, np.ndarray]


class Official(NamedTuple):
    """What a tool did: error type ("" without), message, value."""

    error: str
    message: str
    value: Any


def official(tmp_path: Path, *requests: tuple[Any, ...], needs: str = "torch") -> list[Official]:
    """Run official tools in one process; skip the test where they are not installed."""
    if find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    ask, answer = tmp_path / "ask.json", tmp_path / "answer.json"
    ask.write_text(json.dumps(requests, default=str))
    script = Path(__file__).with_name("official_tools.py")
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script, ask, answer], capture_output=True, text=True, env=env, timeout=300
    )
    assert answer.exists(), done.stderr[-2000:]
    return [Official(*r) for r in json.loads(answer.read_text())]


def ours(source: Path, out: Path, **options: Any) -> Arrays:
    """What ``mconv reshard --to hf`` makes of a checkpoint, by name, in float32."""
    reshard(source, out, Layout("hf"), **options)
    found: Arrays = {}
    for path in out.glob("*.safetensors"):
        for name, tensor in open_checkpoint(path).weights.items():
            found[name] = tensor.read().astype(np.float32)
    return found


def truth(case: Path, *kinds: str) -> Arrays:
    """The ground truth of a DeepSpeed case, of the given kinds."""
    found = load_file(case / "truth.safetensors")
    return {k.partition("/")[2]: v for k, v in found.items() if k.partition("/")[0] in kinds}


def assert_equal(got: Arrays, want: Arrays) -> None:
    assert got.keys() >= want.keys()
    for name, value in want.items():
        assert np.array_equal(got[name], value.astype(np.float32)), name


# ---------------------------------------------------------------- DeepSpeed: zero_to_fp32


def test_frozen_weights_of_zero_1_are_kept(fixtures_dir: Path, tmp_path: Path) -> None:
    """zero_to_fp32 leaves them out and reports success."""
    case = fixtures_dir / "deepspeed/z1_dp2_bf16_frozen"
    (tool,) = official(
        tmp_path, ("zero_to_fp32", case / "ckpt", tmp_path / "o.safetensors"), needs="deepspeed"
    )
    trained, frozen = truth(case, "fp32"), truth(case, "frozen")
    assert tool.error == ""
    assert len(frozen) == 10
    assert not set(tool.value) & set(frozen)
    merged = ours(case / "ckpt", tmp_path / "hf", weights="master")
    assert_equal(merged, trained | frozen)
    assert merged.keys() == trained.keys() | frozen.keys() | truth(case, "buffer").keys()


#: What zero_to_fp32 cannot convert, and the error it dies with.
REFUSED = {
    "z0_dp2_bf16": "TypeError",
    "z1_dp2_bf16opt": "ValueError",
    "pp2_dp2_z1_bf16": "AttributeError",
    "autotp2_dp2_z1_bf16": "ValueError",
    "moe_ep2_dp2_z2_bf16": "ValueError",
    "z2_dp2_bf16_legacyzip": "RuntimeError",
}


def test_layouts_that_zero_to_fp32_refuses(fixtures_dir: Path, tmp_path: Path) -> None:
    """Stage 0, BF16_Optimizer, pipelines, AutoTP, experts, files that are no zip."""
    cases = fixtures_dir / "deepspeed"
    requests = [
        ("zero_to_fp32", cases / n / "ckpt", tmp_path / f"{n}.safetensors") for n in REFUSED
    ]
    for name, tool in zip(REFUSED, official(tmp_path, *requests, needs="deepspeed"), strict=True):
        assert tool.error == REFUSED[name], (name, tool)
        ckpt = open_checkpoint(cases / name / "ckpt")
        want = truth(cases / name, "fp32")
        assert_equal({n: t.read() for n, t in ckpt.optimizer["master"].items()}, want)
        assert not want.keys() - ckpt.weights.keys()


def test_tied_models_as_safetensors(fixtures_dir: Path, tmp_path: Path) -> None:
    """zero_to_fp32 --safe_serialization dies on every tied model."""
    case = fixtures_dir / "deepspeed/z2_dp4_bf16_tied"
    request = ("zero_to_fp32_files", case / "ckpt", tmp_path / "official", "5GB", True)
    (tool,) = official(tmp_path, request, needs="deepspeed")
    assert tool.error == "RuntimeError"
    merged = ours(case / "ckpt", tmp_path / "hf", weights="master")
    assert_equal(merged, truth(case, "fp32"))
    assert "lm_head.weight" not in merged
    assert open_checkpoint(tmp_path / "hf").tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_small_shards_are_small(fixtures_dir: Path, tmp_path: Path) -> None:
    """Each .bin shard of zero_to_fp32 holds the whole model of ZeRO-1 and 2."""
    case = fixtures_dir / "deepspeed/z2_dp2_fp16"
    request = ("zero_to_fp32_files", case / "ckpt", tmp_path / "official", "50KB", False)
    (tool,) = official(tmp_path, request, needs="deepspeed")
    model = sum(v.nbytes for v in truth(case, "fp32").values())
    assert tool.error == ""
    sizes = [n for f, n in tool.value.items() if f.endswith(".bin")]
    assert len(sizes) > 2
    assert sum(sizes) > 1.9 * model
    reshard(
        case / "ckpt", tmp_path / "hf", Layout("hf", max_shard_size=50_000), weights="master"
    )  # fmt: skip
    written = [p.stat().st_size for p in (tmp_path / "hf").glob("*.safetensors")]
    assert len(written) > 2
    assert sum(written) < 1.1 * model + 4096 * len(written)


# ---------------------------------------------------------------- DeepSpeed: ds_to_universal


def wrong_tensors(folder: Path, case: Path) -> list[str]:
    """Names of the masters and moments in a universal checkpoint that are not the truth."""
    ckpt = open_checkpoint(folder)
    states = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    bad = []
    for kind, state in states.items():
        for name, want in truth(case, kind).items():
            found = ckpt.optimizer[state].get(name)
            if found is None or not np.array_equal(found.read().reshape(want.shape), want):
                bad.append(f"{kind}/{name}")
    return bad


def test_round_robin_gradients_in_universal_checkpoints(fixtures_dir: Path, tmp_path: Path) -> None:
    """ds_to_universal trusts slice mappings that are in another order, and says nothing."""
    case = fixtures_dir / "deepspeed/z2_dp3_bf16_rr_groups"
    tag = case / "ckpt/global_step3"
    made = tmp_path / "official" / "global_step3_universal"
    (tool,) = official(tmp_path, ("ds_to_universal", tag, made), needs="deepspeed")
    assert tool.error == ""
    assert len(wrong_tensors(made, case)) > 20
    reshard(case / "ckpt", tmp_path / "ours", Layout("deepspeed-universal"))
    assert wrong_tensors(tmp_path / "ours", case) == []


def test_experts_and_stage_0_as_universal_checkpoints(fixtures_dir: Path, tmp_path: Path) -> None:
    """ds_to_universal dies: local expert names of several ranks collide; stage 0 has no files."""
    cases = {"moe_ep2_dp2_z2_bf16": "RuntimeError", "z0_dp2_bf16": "FileNotFoundError"}
    base = fixtures_dir / "deepspeed"
    requests = [("ds_to_universal", base / n / "ckpt/global_step3", tmp_path / n) for n in cases]
    for name, tool in zip(cases, official(tmp_path, *requests, needs="deepspeed"), strict=True):
        assert tool.error == cases[name], (name, tool)
        reshard(base / name / "ckpt", tmp_path / f"ours-{name}", Layout("deepspeed-universal"))
        assert wrong_tensors(tmp_path / f"ours-{name}", base / name) == []


def test_elastic_checkpoints(fixtures_dir: Path, tmp_path: Path) -> None:
    """ds_to_universal dies on them."""
    case = fixtures_dir / "deepspeed/z2_dp2_fp16"
    folder = Path(shutil.copytree(case / "ckpt", tmp_path / "ckpt")) / "global_step3"
    for path in folder.iterdir():
        path.chmod(0o644)
    _, tool = official(
        tmp_path,
        ("elastic", folder),
        ("ds_to_universal", folder, tmp_path / "u"),
        needs="deepspeed",
    )
    assert tool.error == "AttributeError"
    reshard(tmp_path / "ckpt", tmp_path / "ours", Layout("deepspeed-universal"))
    assert wrong_tensors(tmp_path / "ours", case) == []


# ---------------------------------------------------------------- torch


def test_consolidation_of_scalars_and_integers(tmp_path: Path) -> None:
    """torch's consolidation makes 0 of a 0-d tensor, and dies on integers."""
    values = {
        "w": ("float32", [[1.5, 2.5], [3.5, 4.5]]), "scale": ("float32", 7.25),
        "steps": ("int64", [1, 2**40]),
    }  # fmt: skip
    floats = {n: v for n, v in values.items() if n != "steps"}
    _, scalar, _, integer = official(
        tmp_path,
        ("save_hf_pieces", tmp_path / "floats", floats),
        ("consolidate", tmp_path / "floats", tmp_path / "o1", list(floats)),
        ("save_hf_pieces", tmp_path / "all", values),
        ("consolidate", tmp_path / "all", tmp_path / "o2", list(values)),
    )
    assert scalar.error == ""
    assert scalar.value["w"] == values["w"][1]
    assert scalar.value["scale"] == 0.0  # it was 7.25
    assert integer.error
    reshard(tmp_path / "all", tmp_path / "hf", Layout("hf"))
    found = {n: t.read() for n, t in open_checkpoint(tmp_path / "hf").weights.items()}
    assert {n: a.tolist() for n, a in found.items()} == {n: v[1] for n, v in values.items()}
    assert found["steps"].dtype == np.int64


def test_torch_cannot_read_its_own_safetensors_items(fixtures_dir: Path, tmp_path: Path) -> None:
    """SerializationFormat.SAFETENSORS writes .distcp files that no reader of torch opens."""
    case = fixtures_dir / "torch/dcp_safetensors_fmt_2r"
    (tool,) = official(tmp_path, ("dcp_to_torch", case / "ckpt", tmp_path / "o.pt"))
    assert tool.error
    assert_equal(ours(case / "ckpt", tmp_path / "hf"), load_file(case / "truth.safetensors"))


class Touch:
    """Creates a file when a careless loader builds it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_metadata_is_not_executed(fixtures_dir: Path, tmp_path: Path) -> None:
    """torch reads .metadata with pickle.load: whatever it names is called."""
    folder = Path(shutil.copytree(fixtures_dir / "torch/dcp_fsdp2_2r/ckpt", tmp_path / "ckpt"))
    (folder / ".metadata").chmod(0o644)
    canary = tmp_path / "canary"
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(canary)))
    with pytest.raises(FormatError, match="metadata"):
        open_checkpoint(folder)
    assert not canary.exists()
    official(tmp_path, ("dcp_metadata", folder))
    assert canary.exists()


def test_files_that_torch_load_refuses(fixtures_dir: Path, tmp_path: Path) -> None:
    """Loss scalers are no safe globals; ShardedTensors need the process group of the run."""
    scaler = fixtures_dir / "deepspeed/z2_dp2_fp16"
    sharded = fixtures_dir / "torch/fsdp1_sharded_ranksave_2r"
    optim = min((scaler / "ckpt/global_step3").glob("*optim_states.pt"))
    rank = min(p for p in (sharded / "ckpt").iterdir() if "rank" in p.name)
    tools = official(
        tmp_path,
        ("torch_load", optim, True),
        ("torch_load", rank, True),
        ("torch_load", rank, False),
    )
    assert all(tool.error for tool in tools), tools
    masters = open_checkpoint(scaler / "ckpt").optimizer["master"]
    assert_equal({n: t.read() for n, t in masters.items()}, truth(scaler, "fp32"))
    want = {n: v for n, v in load_file(sharded / "truth.safetensors").items() if "exp_avg" not in n}
    assert_equal(ours(sharded / "ckpt", tmp_path / "hf"), want)


def test_a_training_folder_is_enough(fixtures_dir: Path, tmp_path: Path) -> None:
    """accelerate merge-weights wants the inner folder; given the outer, it lacks a .metadata."""
    case = fixtures_dir / "torch/accelerate_fsdp2_2r"
    (tool,) = official(
        tmp_path, ("merge_fsdp", case / "ckpt", tmp_path / "o"), needs="accelerate"
    )  # fmt: skip
    assert tool.error
    want = {n: v for n, v in load_file(case / "truth.safetensors").items() if "exp_avg" not in n}
    assert_equal(ours(case / "ckpt", tmp_path / "hf"), want)


# ---------------------------------------------------------------- tools that are not installed


@pytest.mark.parametrize(
    "case",
    [
        "dtensor_ranksave_2x2",  # veRL's merger concatenated replicated plain tensors
        "fairscale_flat_2r",  # consolidate_shard_weights: KeyError with non-persistent buffers
        "dcp_fsdp2_tp_2x2",  # strided shards merged left to right give a wrong order
        "meta_consolidated_tp2",  # embeddings cut on dim 1; replicated norms
    ],
)
def test_merges_that_others_get_wrong(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    folder = fixtures_dir / "torch" / case
    truths = load_file(folder / "truth.safetensors")
    want = {n: v for n, v in truths.items() if not n.startswith(("exp_avg", "exp_avg_sq"))}
    config = folder / "config.json"
    options = {"config": config} if config.exists() else {}
    merged = ours(folder / "ckpt", tmp_path / "hf", **options)
    assert_equal(merged, want)
    assert not {
        n for n in merged if n not in want and "inv_freq" not in n and n != "lm_head.weight"
    }


def test_padded_vocabulary_does_not_leak(fixtures_dir: Path, tmp_path: Path) -> None:
    """Bridges exported the padding rows, which are noise, as tokens."""
    case = fixtures_dir / "megatron/llama_tp2pp2"
    merged = ours(case / "torch_dist", tmp_path / "hf", vocab_size=317)
    assert merged["model.embed_tokens.weight"].shape[0] == 317
    assert_equal(merged, load_file(case / "truth.safetensors"))


@pytest.mark.parametrize(
    "case", ["llama_tp4_gqa2", "mixtral_grouped_tp2ep2", "mixtral_tp2ep2_etp1"]
)
def test_megatron_merges_with_right_shapes_and_garbage(
    fixtures_dir: Path, tmp_path: Path, case: str
) -> None:
    """Fewer kv groups than ranks, grouped experts (transposed memory), gate and up cut per rank."""
    folder = fixtures_dir / "megatron" / case
    for container in ("torch", "torch_dist"):
        merged = ours(folder / container, tmp_path / container, vocab_size=317)
        assert_equal(merged, load_file(folder / "truth.safetensors"))
        assert merged.keys() == load_file(folder / "truth.safetensors").keys()


def test_lost_expert_files_are_named(fixtures_dir: Path, tmp_path: Path) -> None:
    """Megatron-Core up to 0.16.1 writes no file for some ranks of experts; nobody notices."""
    source = fixtures_dir / "megatron/mixtral_tp2ep2_etp1/torch"
    ranks = sorted(p.name for p in source.glob("*/mp_rank*"))
    assert len(ranks) > 1
    for rank in ranks:
        folder = Path(shutil.copytree(source, tmp_path / rank))
        shutil.rmtree(next(folder.glob(f"*/{rank}")))
        with pytest.raises(FormatError, match="rank"):
            open_checkpoint(folder)


def test_lost_expert_chunks_are_named(fixtures_dir: Path, tmp_path: Path) -> None:
    """torch_dist with expert tensor parallelism saved one part of the expert weights only."""
    source = fixtures_dir / "megatron/mixtral_tp2ep2_etp1/torch_dist"
    folder = Path(shutil.copytree(source, tmp_path / "ckpt"))
    inner = min(folder.glob("iter_*"))
    (inner / ".metadata").chmod(0o644)
    (tool,) = official(tmp_path, ("drop_chunks", inner, "experts"))
    assert tool.error == ""
    assert tool.value
    with pytest.raises(FormatError, match=r"experts.*(in no file|no item|missing)"):
        reshard(folder, tmp_path / "hf", Layout("hf"), vocab_size=317)
    assert not (tmp_path / "hf").exists()
