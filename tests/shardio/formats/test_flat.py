"""Flat parameters: FairScale FSDP (metaseq) and FSDP1 LOCAL_STATE_DICT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.errors import FormatError, LayoutError, MconvError, UnsupportedError
from mconv.shardio.registry import open_checkpoint

from .torch_cases import assert_equals_truth, cut, load_truth, swap, writable_copy


@pytest.fixture
def scale(fixtures_dir: Path, tmp_path: Path) -> Path:
    return writable_copy(fixtures_dir / "torch/fairscale_flat_2r/ckpt", tmp_path / "scale")


@pytest.fixture
def local(fixtures_dir: Path, tmp_path: Path) -> Path:
    return writable_copy(fixtures_dir / "torch/fsdp1_local_flat_2r/ckpt", tmp_path / "local")


# -- FairScale ------------------------------------------------------------------------------------


def test_fairscale_equals_truth(fixtures_dir: Path) -> None:
    """Its own consolidation raises KeyError on these: the model has non-persistent buffers."""
    folder = fixtures_dir / "torch" / "fairscale_flat_2r"
    checkpoint = open_checkpoint(folder / "ckpt")
    assert checkpoint.format == "fairscale"
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))


@pytest.mark.parametrize("rank", [0, 1])
def test_fairscale_missing_shard(scale: Path, rank: int) -> None:
    (scale / f"checkpoint_last-shard{rank}.pt").unlink()
    with pytest.raises((FormatError, LayoutError), match="missing"):
        open_checkpoint(scale)


def test_fairscale_swapped(scale: Path) -> None:
    swap(scale / "checkpoint_last-shard0.pt", scale / "checkpoint_last-shard1.pt")
    with pytest.raises(FormatError, match="swapped"):
        open_checkpoint(scale)


def test_fairscale_truncated(scale: Path) -> None:
    cut(scale / "checkpoint_last-shard1.pt")
    with pytest.raises(FormatError):
        open_checkpoint(scale)


def test_fairscale_several_saves(scale: Path) -> None:
    for rank in range(2):
        name = f"checkpoint_7_100-shard{rank}.pt"
        shutil.copyfile(scale / f"checkpoint_last-shard{rank}.pt", scale / name)
    assert len(open_checkpoint(scale).weights) == 21
    for rank in range(2):
        (scale / f"checkpoint_last-shard{rank}.pt").rename(scale / f"checkpoint_8-shard{rank}.pt")
    with pytest.raises(FormatError, match="several saves"):
        open_checkpoint(scale)
    assert len(open_checkpoint(scale / "checkpoint_8-shard1.pt").weights) == 21


def _opt_part(part: int, shards: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """One model part of a metaseq decoder, cut into shards; the last one padded."""
    torch = pytest.importorskip("torch")
    shapes = {"embed_tokens.weight": (5, 4), "layers.0.self_attn.qkv_proj.weight": (6, 4),
              "layers.0.self_attn.out_proj.weight": (4, 2), "layers.0.fc1.bias": (3,)}  # fmt: skip
    arrays = {n: rng.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    flat = np.concatenate([a.reshape(-1) for a in arrays.values()])
    size = -(-len(flat) // shards)
    files = []
    for r in range(shards):
        piece = flat[r * size : (r + 1) * size]
        padding = size - len(piece)
        piece = np.pad(piece, (0, padding))
        info = {"names": list(shapes), "shapes": list(shapes.values()),
                "numels": [int(np.prod(s)) for s in shapes.values()],
                "padding": padding}  # fmt: skip
        metadata = {
            "fsdp_path": "decoder",
            "params": {"flat_param_0": info},
            "shared_param_info": [("embed_tokens.weight", "output_projection.weight")],
        }
        moments = {0: {"exp_avg": torch.from_numpy(piece * 2), "step": 7}}
        files.append({
            "model": {"decoder.flat_param_0": torch.from_numpy(piece),
                      "decoder.layer_norm.weight": torch.ones(4)},
            "shard_metadata": {"param_metadata": [metadata], "buffer_names": []},
            "last_optimizer_state": {"state": moments, "param_groups": [{"lr": 0.1}]},
            "cfg": {"model": {"arch": "transformer_lm_megatron"}},
        })  # fmt: skip
    files[0]["arrays"] = arrays
    return files


def test_metaseq_model_parts(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    arrays = []
    for part in range(2):
        files = _opt_part(part, 4, rng)
        arrays.append(files[0].pop("arrays"))
        for r, file in enumerate(files):
            torch.save(file, tmp_path / f"checkpoint_last-model_part-{part}-shard{r}.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.layout.tp, checkpoint.layout.dp, checkpoint.step) == (2, 4, 7)
    assert checkpoint.tied == {"decoder.output_projection.weight": "decoder.embed_tokens.weight"}
    assert checkpoint.args["cfg"]["model"]["arch"] == "transformer_lm_megatron"
    name = "layers.0.self_attn.qkv_proj.weight"
    q, k, v = (np.concatenate([np.split(a[name], 3)[i] for a in arrays]) for i in range(3))
    expected = {
        "embed_tokens.weight": np.concatenate([a["embed_tokens.weight"] for a in arrays]),
        name: np.concatenate([q, k, v]),
        "layers.0.self_attn.out_proj.weight": np.concatenate(
            [a["layers.0.self_attn.out_proj.weight"] for a in arrays], axis=1
        ),
        "layers.0.fc1.bias": np.concatenate([a["layers.0.fc1.bias"] for a in arrays]),
    }
    assert len(checkpoint.weights) == 5
    for key, value in expected.items():
        assert np.array_equal(checkpoint.weights[f"decoder.{key}"].read(), value), key
        found = checkpoint.optimizer["exp_avg"][f"decoder.{key}"].read()
        assert np.array_equal(found, value * 2), key


def test_fairscale_without_metadata(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"model": {"flat_param_0": torch.ones(4)}}, tmp_path / "checkpoint_last-shard0.pt")
    with pytest.raises(FormatError, match="no shard_metadata"):
        open_checkpoint(tmp_path)


def test_fairscale_lying_metadata(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    info = {"names": ["w"], "shapes": [(2, 2)], "numels": [9], "padding": 0}
    metadata = {"param_metadata": [{"fsdp_path": "", "params": {"flat_param_0": info}}]}
    saved = {"model": {"flat_param_0": torch.ones(4)}, "shard_metadata": metadata}
    torch.save(saved, tmp_path / "checkpoint_last-shard0.pt")
    with pytest.raises(FormatError, match="contradict"):
        open_checkpoint(tmp_path)


# -- FSDP1 ----------------------------------------------------------------------------------------


def _drop_side_metadata(folder: Path) -> None:
    for path in folder.glob("flat_meta*.json"):
        path.unlink()


def test_local_flat_with_side_metadata(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "torch" / "fsdp1_local_flat_2r"
    checkpoint = open_checkpoint(folder / "ckpt")
    assert any("flat_meta-rank00.json" in w for w in checkpoint.warnings)
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))


def test_local_flat_with_config(fixtures_dir: Path, local: Path) -> None:
    folder = fixtures_dir / "torch" / "fsdp1_local_flat_2r"
    _drop_side_metadata(local)
    checkpoint = open_checkpoint(local, config=folder / "config.json")
    assert any("assumed" in w for w in checkpoint.warnings)
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))


def test_local_flat_alone_is_refused(local: Path) -> None:
    _drop_side_metadata(local)
    with pytest.raises(UnsupportedError, match="--config"):
        open_checkpoint(local)


def test_local_flat_with_another_models_config(fixtures_dir: Path, local: Path) -> None:
    _drop_side_metadata(local)
    config = json.loads(
        (fixtures_dir / "torch" / "fsdp1_local_flat_2r" / "config.json").read_text()
    )
    other = local.parent / "other.json"
    other.write_text(json.dumps({**config, "intermediate_size": 192}))
    with pytest.raises(LayoutError, match="another model"):
        open_checkpoint(local, config=other)


def test_local_flat_swapped_ranks(local: Path) -> None:
    swap(local / "model-rank00.pt", local / "model-rank01.pt")
    with pytest.raises(MconvError, match="swapped"):
        open_checkpoint(local)


def test_local_flat_metadata_of_another_model(local: Path) -> None:
    for path in local.glob("flat_meta*.json"):
        tree = json.loads(path.read_text())
        tree["_flat_param"]["shapes"][0] = [400, 64]
        path.write_text(json.dumps(tree))
    with pytest.raises(LayoutError, match="elements"):
        open_checkpoint(local)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_parameter_order_is_that_of_transformers(model_type: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from mconv.shardio.hf_parameters import parameters_of

    config = transformers.AutoConfig.for_model(
        model_type, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=32,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    found = parameters_of(config.to_dict())
    assert list(found.items()) == list(expected.items())
