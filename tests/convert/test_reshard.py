"""Merging the real frameworks' checkpoints to Hugging Face folders, against independent truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mconv import Layout, diff, open_checkpoint, reshard
from mconv.errors import ConfigError, FormatError, OutputError
from mconv.shardio.stream import Limits
from safetensors import safe_open

TORCH = [
    "dcp_fsdp2_2r",
    "dcp_fsdp2_tp_2x2",
    "dcp_threads_2r",
    "dcp_hf_sharded_3r",
    "dcp_hf_consolidated_2r",
    "accelerate_fsdp2_2r",
    "hf_safetensors_sharded",
    "hf_bin_sharded",
    "ddp_torchsave_2r",
]
DEEPSPEED = [
    "z1_dp2_bf16",
    "z2_dp2_fp16",
    "z2_dp4_bf16_tied",
    "z1_dp3_fp32_odd",
    "z3_dp2_bf16",
    "z3_dp3_bf16_odd_subgroups",
    "z3_dp2_bf16_lora",
]
MEGATRON = [
    "llama_tp2pp2",
    "llama_tp4_gqa2",
    "llama_legacy_tp2pp2",
    "llama_tp2pp2_vpp2",
    "qwen2_bias_tp2",
]


def read(folder: Path, stem: str = "model") -> dict[str, np.ndarray]:
    """Read a written folder with the safetensors library, as float32."""
    torch = pytest.importorskip("torch")
    out = {}
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        with safe_open(path, "pt") as f:
            out.update({k: f.get_tensor(k).to(torch.float32).numpy() for k in f.keys()})  # noqa: SIM118
    return out


def equal(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert sorted(got) == sorted(want)
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def truth(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    values = read(path, "truth")
    if prefix:
        return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    return {k: v for k, v in values.items() if "/" not in k}


@pytest.mark.parametrize("case", TORCH)
def test_torch_formats_merge_to_the_truth(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    folder = fixtures_dir / "torch" / case
    config = folder / "config.json"
    reshard(
        folder / "ckpt",
        tmp_path / "out",
        config=config if config.exists() else None,
        with_optimizer=True,
    )
    equal(read(tmp_path / "out"), truth(folder))
    states = read(tmp_path / "out", "optimizer")
    for state in ("exp_avg", "exp_avg_sq"):
        want = truth(folder, f"{state}/")
        got = {
            k.removeprefix(f"{state}."): v for k, v in states.items() if k.startswith(f"{state}.")
        }
        equal(got, want)


@pytest.mark.parametrize("case", DEEPSPEED)
def test_deepspeed_masters_merge_to_the_truth(
    fixtures_dir: Path, tmp_path: Path, case: str
) -> None:
    folder = fixtures_dir / "deepspeed" / case
    reshard(folder / "ckpt", tmp_path / "out", weights="master", with_optimizer=True)
    got = read(tmp_path / "out")
    for name, x in truth(folder, "fp32/").items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    states = read(tmp_path / "out", "optimizer")
    for state in ("exp_avg", "exp_avg_sq"):
        for name, x in truth(folder, f"{state}/").items():
            np.testing.assert_array_equal(states[f"{state}.{name}"], x, err_msg=name)


@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
@pytest.mark.parametrize("case", MEGATRON)
def test_megatron_merges_to_the_truth(
    fixtures_dir: Path, tmp_path: Path, case: str, kind: str
) -> None:
    folder = fixtures_dir / "megatron" / case
    if not (folder / kind).exists():
        pytest.skip(f"{case} has no {kind}")
    reshard(folder / kind, tmp_path / "out", vocab_size=317)
    equal(read(tmp_path / "out"), truth(folder))


@pytest.mark.parametrize("case", ["deepspeed/z3_dp2_bf16/ckpt", "megatron/llama_tp2pp2/torch"])
def test_transformers_loads_the_result(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    transformers = pytest.importorskip("transformers")
    reshard(
        fixtures_dir / case,
        tmp_path / "out",
        Layout("hf", dtype="bf16"),
        vocab_size=None if "deepspeed" in case else 317,
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    want = read(tmp_path / "out")
    for name, p in model.state_dict().items():
        if name in want:
            np.testing.assert_array_equal(p.float().numpy(), want[name])


def test_small_shards_have_an_index_and_the_same_tensors(
    fixtures_dir: Path, tmp_path: Path
) -> None:
    source = fixtures_dir / "torch/hf_safetensors_sharded/ckpt"
    report = reshard(source, tmp_path / "out", Layout("hf", max_shard_size=30_000))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert set(report.files) == {p.name for p in (tmp_path / "out").iterdir()}
    equal(read(tmp_path / "out"), truth(source.parent))
    assert diff(source, tmp_path / "out").equal
    assert open_checkpoint(tmp_path / "out").warnings == ()


def test_bytes_do_not_depend_on_threads_or_memory(fixtures_dir: Path, tmp_path: Path) -> None:
    source = fixtures_dir / "deepspeed/z3_dp3_bf16_odd_subgroups/ckpt"
    for k, limits in enumerate([Limits(1 << 20, 1), Limits(1 << 30, 4)]):
        reshard(source, tmp_path / str(k), Layout("hf", dtype="bf16"), limits=limits)
    for path in (tmp_path / "0").iterdir():
        assert path.read_bytes() == (tmp_path / "1" / path.name).read_bytes()


def test_padded_vocabulary_is_never_trimmed_or_kept_silently(
    fixtures_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"  # away from the config.json that tells the size
    shutil.copytree(fixtures_dir / "megatron/llama_tp2pp2/torch", source)
    with pytest.raises(ConfigError, match="--vocab-size"):
        reshard(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    reshard(source, tmp_path / "out", vocab_size=317)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 317


def test_dry_run_writes_nothing(fixtures_dir: Path, tmp_path: Path) -> None:
    report = reshard(fixtures_dir / "torch/dcp_fsdp2_2r/ckpt", tmp_path / "out", dry_run=True)
    assert report.nbytes > 0
    assert list(tmp_path.iterdir()) == []


def test_refusals(fixtures_dir: Path, tmp_path: Path) -> None:
    source = fixtures_dir / "torch/dcp_fsdp2_2r/ckpt"
    with pytest.raises(ConfigError, match="did you mean 'hf'"):
        reshard(source, tmp_path / "out", Layout("hff"))
    with pytest.raises(ConfigError, match="no fp32 master weights"):
        reshard(source, tmp_path / "out", weights="master")
    with pytest.raises(FormatError, match="no such file"):
        reshard(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="--force"):
        reshard(source, tmp_path / "out")
