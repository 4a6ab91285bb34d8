"""Meta's consolidated.NN.pth: fixtures, kv heads repeated over files, one file, broken sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mconv.convert.naming import to_hf
from mconv.errors import FormatError, LayoutError, UnsupportedError
from mconv.shardio.compare import check_replicas
from mconv.shardio.registry import open_checkpoint

from .torch_cases import assert_equals_truth, cut, load_truth, swap, writable_copy

CASES = ("ckpt", "ckpt_vocab_split")


@pytest.mark.parametrize("name", CASES)
def test_equals_truth(fixtures_dir: Path, name: str) -> None:
    folder = fixtures_dir / "torch" / "meta_consolidated_tp2"
    checkpoint = open_checkpoint(folder / name)
    assert (checkpoint.format, checkpoint.naming, checkpoint.layout.tp) == ("meta", "meta", 2)
    check_replicas(checkpoint.weights, checkpoint.replicas)
    assert_equals_truth(to_hf(checkpoint), load_truth(folder / "truth.safetensors"))


def test_config_comes_from_params(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = fixtures_dir / "torch" / "meta_consolidated_tp2"
    copy = writable_copy(folder / "ckpt", tmp_path / "ckpt")
    made = to_hf(open_checkpoint(copy))
    truth = json.loads((folder / "config.json").read_text())
    assert made.config is not None
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "hidden_act",
                "model_type", "tie_word_embeddings"):  # fmt: skip
        assert made.config[key] == truth[key], key
    assert any("context length" in w for w in made.warnings)


@pytest.fixture
def copy(fixtures_dir: Path, tmp_path: Path) -> Path:
    source = fixtures_dir / "torch" / "meta_consolidated_tp2" / "ckpt"
    return writable_copy(source, tmp_path / "ckpt")


def test_any_of_its_files_opens_it(copy: Path) -> None:
    assert len(open_checkpoint(copy / "consolidated.01.pth").weights) == 22


def test_missing_first_file(copy: Path) -> None:
    (copy / "consolidated.00.pth").unlink()
    with pytest.raises(FormatError, match=r"consolidated\.00\.pth"):
        open_checkpoint(copy)


def test_missing_last_file(copy: Path) -> None:
    (copy / "consolidated.01.pth").unlink()
    with pytest.raises(LayoutError, match="files are missing"):
        open_checkpoint(copy)


def test_truncated(copy: Path) -> None:
    cut(copy / "consolidated.01.pth")
    with pytest.raises(FormatError):
        open_checkpoint(copy)


def test_swapped(copy: Path) -> None:
    swap(copy / "consolidated.00.pth", copy / "consolidated.01.pth")
    with pytest.raises(FormatError, match="swapped or renamed"):
        open_checkpoint(copy)


def test_params_of_another_model(copy: Path) -> None:
    params = json.loads((copy / "params.json").read_text())
    (copy / "params.json").write_text(json.dumps({**params, "n_kv_heads": 4}))
    with pytest.raises(LayoutError, match="another model"):
        open_checkpoint(copy)


def _save(folder: Path, parts: list[dict[str, np.ndarray]], params: dict[str, object]) -> Path:
    torch = pytest.importorskip("torch")
    folder.mkdir()
    for i, part in enumerate(parts):
        tensors = {n: torch.from_numpy(a.copy()) for n, a in part.items()}
        torch.save(tensors, folder / f"consolidated.{i:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def _layer(rng: np.random.Generator, dim: int, kv: int, width: int) -> dict[str, np.ndarray]:
    shapes = {"attention.wq": (dim, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim),
              "attention.wo": (dim, dim), "feed_forward.w1": (width, dim),
              "feed_forward.w2": (dim, width), "feed_forward.w3": (width, dim),
              "attention_norm": (dim,), "ffn_norm": (dim,)}  # fmt: skip
    found = {f"layers.0.{n}.weight": s for n, s in shapes.items()}
    found |= {"norm.weight": (dim,), "tok_embeddings.weight": (12, dim)}
    found["output.weight"] = (12, dim)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in found.items()}


PARAMS = {"dim": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 12,
          "norm_eps": 1e-5, "multiple_of": 8}  # fmt: skip


def test_repeated_kv_heads_are_compared_not_joined(tmp_path: Path) -> None:
    whole = _layer(np.random.default_rng(0), 16, 8, 24)
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(4)]
    for name, value in whole.items():
        kind = name.split(".")[-2]
        for rank in range(4):
            if kind in ("wk", "wv"):
                piece = np.split(value, 2)[rank // 2]
            elif kind.endswith("norm"):
                piece = value
            else:
                piece = np.split(value, 4, axis=1 if kind in ("wo", "w2") else 0)[rank]
            parts[rank][name] = piece
    checkpoint = open_checkpoint(_save(tmp_path / "c", parts, PARAMS))
    for name, value in whole.items():
        assert np.array_equal(checkpoint.weights[name].read(), value), name
    check_replicas(checkpoint.weights, checkpoint.replicas)
    parts[1]["layers.0.attention.wk.weight"] = parts[1]["layers.0.attention.wk.weight"] + 1
    checkpoint = open_checkpoint(_save(tmp_path / "d", parts, PARAMS))
    with pytest.raises(FormatError, match=r"layers\.0\.attention\.wk"):
        check_replicas(checkpoint.weights, checkpoint.replicas)


def test_names_and_dtypes_must_agree(tmp_path: Path) -> None:
    part = _layer(np.random.default_rng(0), 16, 8, 24)
    other = {n: a for n, a in part.items() if "w3" not in n}
    with pytest.raises(FormatError, match="different models"):
        open_checkpoint(_save(tmp_path / "a", [part, other], PARAMS))
    half = {n: a.astype(np.float16) for n, a in part.items()}
    with pytest.raises(FormatError, match="different saves"):
        open_checkpoint(_save(tmp_path / "b", [part, half], PARAMS))


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    part = _layer(np.random.default_rng(0), 16, 8, 24)
    part["layers.0.feed_forward.experts.moe_w_in_eD_F"] = np.zeros((8, 4), np.float32)
    with pytest.raises(UnsupportedError, match="moe_w_in_eD_F"):
        open_checkpoint(_save(tmp_path / "a", [part, part], PARAMS))


def test_mistral_consolidated_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    whole = _layer(np.random.default_rng(1), 16, 8, 24)
    safetensors.save_file(whole, tmp_path / "consolidated.safetensors")
    params = {"dim": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4,
              "hidden_dim": 24, "vocab_size": 12, "norm_eps": 1e-5}  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.naming) == ("hf", "meta")
    made = to_hf(checkpoint)
    assert made.config is not None
    assert made.config["model_type"] == "mistral"
    q = whole["layers.0.attention.wq.weight"].reshape(4, 2, 2, 16).transpose(0, 2, 1, 3)
    found = made.weights["model.layers.0.self_attn.q_proj.weight"].read()
    assert np.array_equal(found, q.reshape(16, 16))
