"""GGUF as a checkpoint: converted there and read back, quantized, split, broken."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.formats.gguf import detect
from mconv.convert.naming import to_hf
from mconv.convert.to_gguf import to_gguf
from mconv.errors import ConfigError, FormatError, MconvError
from mconv.shardio.registry import open_checkpoint

from .. import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Path]:
    pytest.importorskip("transformers")
    found = {}
    for name in ("llama3", "qwen2", "qwen3"):
        folder = tmp_path_factory.mktemp(name)
        vocabulary = "qwen2" if name.startswith("qwen") else "llama-bpe"
        size = tiny.save_bpe(data_dir / "vocab" / f"ggml-vocab-{vocabulary}.gguf", folder, 512)
        tiny.save_model(name, folder, size)
        found[name] = folder
    return found


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_there_and_back(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    to_gguf(models[name], tmp_path / "m.gguf", "f32")
    opened = open_checkpoint(tmp_path / "m.gguf")
    assert (opened.format, opened.naming) == ("gguf", "gguf")
    made, source = to_hf(opened), open_checkpoint(models[name])
    assert set(made.weights) == set(source.weights)
    for key, tensor in source.weights.items():
        assert np.array_equal(made.weights[key].read(), tensor.read().astype(np.float32)), key
    assert made.config is not None
    assert source.config is not None
    for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size"):
        assert made.config[key] == source.config[key], key


def test_quantized_tensors_are_decoded(models: dict[str, Path], tmp_path: Path) -> None:
    to_gguf(models["llama3"], tmp_path / "m.gguf", "q8_0")
    made, source = to_hf(open_checkpoint(tmp_path)), open_checkpoint(models["llama3"])
    assert any("Q8_0" in w for w in made.warnings)
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = source.weights[name].read().astype(np.float32)
    step = np.abs(exact).max() / 127
    assert np.abs(made.weights[name].read() - exact).max() <= step


def test_damaged(models: dict[str, Path], tmp_path: Path) -> None:
    to_gguf(models["qwen2"], tmp_path / "m.gguf", "f16")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:-100])
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_vocabulary_is_no_model(data_dir: Path) -> None:
    with pytest.raises(FormatError, match="only a vocabulary"):
        open_checkpoint(data_dir / "vocab" / "ggml-vocab-qwen2.gguf")


def test_unknown_architectures_ask_for_a_config(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    to_gguf(models["qwen2"], tmp_path / "m.gguf", "f16")
    opened = open_checkpoint(tmp_path / "m.gguf")
    args: dict[str, Any] = {**opened.args, "general.architecture": "mamba"}
    with pytest.raises(MconvError) as e:
        to_hf(replace(opened, args=args, config=None))
    assert isinstance(e.value, ConfigError)


def test_an_importance_matrix_beside_is_no_model(tmp_path: Path) -> None:
    def head(kind: bytes) -> bytes:
        counts = struct.pack("<IQQ", 3, 0, 1)
        key = struct.pack("<Q", 12) + b"general.type" + struct.pack("<I", 8)
        return b"GGUF" + counts + key + struct.pack("<Q", len(kind)) + kind

    (tmp_path / "imatrix.gguf").write_bytes(head(b"imatrix"))
    assert detect(tmp_path) is None  # the steps of a trainer's run are below
    (tmp_path / "m.gguf").write_bytes(head(b"model"))
    assert detect(tmp_path) == tmp_path / "m.gguf"
    (tmp_path / "n.gguf").write_bytes(head(b"model"))
    assert detect(tmp_path) is None  # which one?
