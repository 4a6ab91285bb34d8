"""nanotron: the fixture, optimizers of both kinds made from it, broken folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.naming import to_hf
from mconv.errors import FormatError, MconvError, UnsupportedError
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.safetensors_header import read_header

from .torch_cases import assert_equals_truth, cut, load_truth, swap, writable_copy

QKV = "model/model/decoder/0/pp_block/attn/qkv_proj/model_weight_pp-rank-0-of-2_tp-rank-{}-of-2"


@pytest.fixture
def copy(fixtures_dir: Path, tmp_path: Path) -> Path:
    source = fixtures_dir / "nanotron" / "nanotron_tp2_pp2" / "ckpt"
    return writable_copy(source, tmp_path / "10")


def test_equals_truth(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "nanotron" / "nanotron_tp2_pp2"
    checkpoint = open_checkpoint(folder / "ckpt")
    assert (checkpoint.format, checkpoint.step, checkpoint.version) == ("nanotron", 2, "1.5")
    assert checkpoint.layout.describe() == "nanotron tp=2 pp=2"
    made = to_hf(checkpoint)
    assert_equals_truth(made, load_truth(folder / "truth.safetensors"))
    assert made.config is not None
    assert (made.config["model_type"], made.config["num_key_value_heads"]) == ("llama", 2)


def test_interleaved_rotary_is_undone(copy: Path) -> None:
    plain = to_hf(open_checkpoint(copy))
    settings = json.loads((copy / "model_config.json").read_text())
    (copy / "model_config.json").write_text(json.dumps({**settings, "rope_interleaved": True}))
    made = to_hf(open_checkpoint(copy))
    name = "model.layers.0.self_attn.k_proj.weight"
    pairs = plain.weights[name].read().reshape(2, 8, 2, 64)
    halves = pairs.transpose(0, 2, 1, 3).reshape(32, 64)
    assert made.weights[name].read().tobytes() == halves.tobytes()
    other = "model.layers.0.self_attn.v_proj.weight"
    assert made.weights[other].read().tobytes() == plain.weights[other].read().tobytes()


def test_the_newest_step_of_a_run(copy: Path) -> None:
    shutil.copytree(copy, copy.parent / "9")
    (copy.parent / "latest.txt").write_text("10")
    assert open_checkpoint(copy.parent).path.name == "10"


# -- optimizers, cut from the weights as nanotron cuts them ---------------------------------------


def _parts(folder: Path) -> list[tuple[str, int, int, np.ndarray]]:
    """(name, pp, tp, local part) of every file; unsharded ones are on both tp ranks."""
    import re

    found = []
    for path in sorted((folder / "model").rglob("*.safetensors")):
        entry = read_header(path).tensors["data"]
        raw = path.read_bytes()[entry.start : entry.stop]
        value = np.frombuffer(raw, entry.dtype).reshape(entry.shape).astype(np.float32)
        name = ".".join((*path.parent.relative_to(folder / "model").parts, "weight"))
        m = re.search(r"pp-rank-(\d)-of-2_tp-rank-(\d)", path.name)
        if m:
            found.append((name, int(m[1]), int(m[2]), value))
        else:
            stage = 0 if ".0." in name else 1
            found += [(name, stage, tp, value) for tp in range(2)]
    return found


def _write_optimizer(folder: Path, dp: int) -> None:
    """Moments that are the weight times 2 and 3; masters that are the weight."""
    torch = pytest.importorskip("torch")
    target = folder / "optimizer"
    target.mkdir()
    offsets: dict[str, dict[str, list[str]]] = {}
    for pp in range(2):
        for tp in range(2):
            mine = [(n, v) for n, p, t, v in _parts(folder) if (p, t) == (pp, tp)]
            for d in range(dp):
                state: dict[int, Any] = {}
                names = {}
                for i, (name, value) in enumerate(mine):
                    flat = torch.from_numpy(value).reshape(-1)
                    size = flat.numel()
                    lo, hi = d * size // dp, (d + 1) * size // dp
                    offsets.setdefault(name, {})[str(d)] = [str(lo), str(hi)]
                    part = flat[lo:hi] if dp > 1 else torch.from_numpy(value)
                    state[i] = {"exp_avg": 2 * part, "exp_avg_sq": 3 * part,
                                "step": torch.tensor(2.0)}  # fmt: skip
                    names[i] = "module." + name
                masters = {n: torch.from_numpy(v) for n, v in mine}
                saved = {"state": state, "names": names, "gradient_accumulator": masters,
                         "param_groups": [{"lr": 0.1, "params": list(names)}]}  # fmt: skip
                rank = f"_dp-{d}-of-{dp}" if dp > 1 else ""
                file = f"optimizer_pp-{pp}-of-2{rank}_tp-{tp}-of-2_exp-0-of-1.pt"
                torch.save(saved, target / file)
    configs = {"param_name_to_dp_rank_offsets": offsets} if dp > 1 else {}
    (target / "optimizer_config.json").write_text(json.dumps({"type": "x", "configs": configs}))


@pytest.mark.parametrize("dp", [1, 3])
def test_optimizer(copy: Path, dp: int) -> None:
    _write_optimizer(copy, dp)
    checkpoint = open_checkpoint(copy)
    assert set(checkpoint.optimizer) == {"exp_avg", "exp_avg_sq", "master"}
    for state, factor in {"exp_avg": 2, "exp_avg_sq": 3, "master": 1}.items():
        assert set(checkpoint.optimizer[state]) == set(checkpoint.weights)
        for name, tensor in checkpoint.optimizer[state].items():
            expected = checkpoint.weights[name].read().astype(np.float32) * factor
            assert np.array_equal(tensor.read(), expected), (state, name)
    assert checkpoint.scalars["param_groups"] == [{"lr": 0.1}]
    assert len(to_hf(checkpoint).optimizer["exp_avg"]) == 21


def test_a_missing_optimizer_file(copy: Path) -> None:
    _write_optimizer(copy, 2)
    (copy / "optimizer" / "optimizer_pp-1-of-2_dp-0-of-2_tp-1-of-2_exp-0-of-1.pt").unlink()
    with pytest.raises(FormatError, match="7 optimizer files"):
        open_checkpoint(copy)


# -- broken folders -------------------------------------------------------------------------------


def test_missing_rank(copy: Path) -> None:
    (copy / (QKV.format(1) + ".safetensors")).unlink()
    with pytest.raises(FormatError, match=r"tp ranks \[1\] are missing"):
        open_checkpoint(copy)


def test_truncated(copy: Path) -> None:
    cut(copy / (QKV.format(1) + ".safetensors"))
    with pytest.raises(FormatError, match="truncated"):
        open_checkpoint(copy)


def test_swapped_ranks(copy: Path) -> None:
    swap(*(copy / (QKV.format(t) + ".safetensors") for t in (0, 1)))
    with pytest.raises(FormatError, match="swapped"):
        open_checkpoint(copy)


def test_two_copies_of_one_rank(copy: Path) -> None:
    zero, one = (copy / (QKV.format(t) + ".safetensors") for t in (0, 1))
    shutil.copyfile(zero, one)
    with pytest.raises(FormatError):
        open_checkpoint(copy)


def test_unfinished(copy: Path) -> None:
    (copy / "checkpoint_metadata.json").unlink()
    with pytest.raises(FormatError, match="did not finish"):
        open_checkpoint(copy)


def test_other_tp_size(copy: Path) -> None:
    meta = json.loads((copy / "checkpoint_metadata.json").read_text())
    (copy / "checkpoint_metadata.json").write_text(json.dumps({**meta, "tp": 4}))
    with pytest.raises(FormatError, match="tp=4"):
        open_checkpoint(copy)


def test_lost_tensor_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "model/model/decoder/1/pp_block/input_layernorm")
    with pytest.raises(MconvError, match="input_layernorm of layer 1"):
        to_hf(open_checkpoint(copy))


def test_spread_experts_are_refused(copy: Path) -> None:
    path = copy / (QKV.format(1) + ".safetensors")
    path.rename(path.with_name(path.name.replace(".safetensors", "_exp-rank-0-of-2.safetensors")))
    with pytest.raises(UnsupportedError, match="experts"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unsharded_shape", "__import__('os')"),
        ("unsharded_shape", "(9999999, 64)"),
        ("local_global_slices_pairs", "0,32,2|None,None,None#0,32,None|None,None,None"),
        ("local_global_slices_pairs", "0,99,None|None,None,None#0,99,None|None,None,None"),
        ("local_global_slices_pairs", "-5,32,None|None,None,None#0,37,None|None,None,None"),
        ("local_global_slices_pairs", ""),
    ],
)
def test_lying_metadata(copy: Path, key: str, value: str) -> None:
    from safetensors.numpy import load_file, save_file

    path = copy / (QKV.format(1) + ".safetensors")
    metadata = dict(read_header(path).metadata)
    save_file(load_file(path), path, {**metadata, key: value})
    with pytest.raises(MconvError):
        open_checkpoint(copy)
