"""Hugging Face checkpoints and DCP in Hugging Face form: fixtures, variants, broken folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.errors import FormatError, MconvError
from mconv.shardio.registry import locate, open_checkpoint
from safetensors.numpy import load_file, save_file

from .torch_cases import assert_equals_truth, cut, load_truth, swap, writable_copy

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("case", "format"),
    [
        ("hf_safetensors_sharded", "hf"),
        ("hf_bin_sharded", "hf"),
        ("dcp_hf_consolidated_2r", "hf"),
        ("dcp_hf_sharded_3r", "hf_dcp"),
    ],
)
def test_equals_truth(fixtures_dir: Path, case: str, format: str) -> None:
    folder = fixtures_dir / "torch" / case
    checkpoint = open_checkpoint(folder / "ckpt")
    assert checkpoint.format == format
    assert not checkpoint.warnings
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))


def test_shared_storage_is_a_tie(fixtures_dir: Path) -> None:
    checkpoint = open_checkpoint(fixtures_dir / "torch" / "hf_bin_sharded" / "ckpt")
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_pieces_before_consolidation_are_read(fixtures_dir: Path, tmp_path: Path) -> None:
    source = fixtures_dir / "torch" / "dcp_hf_consolidated_2r"
    folder = writable_copy(source / "ckpt", tmp_path / "c")
    assert open_checkpoint(folder / "sharded").format == "hf_dcp"
    (folder / INDEX).unlink()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "hf_dcp"
    assert_equals_truth(checkpoint, load_truth(source / "truth.safetensors"))


# -- names and variants ---------------------------------------------------------------------------


def _weights(seed: int, names: str = "abcd") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal((3, 4)).astype(np.float32) for n in names}


def _sharded(folder: Path, stem: str, tensors: dict[str, np.ndarray], index: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    table = {}
    for i, name in enumerate(names):
        file = f"{stem}-{i + 1:05d}-of-{len(names):05d}.safetensors"
        save_file({name: tensors[name]}, folder / file)
        table[name] = file
    if index:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def _same(path: Path, tensors: dict[str, np.ndarray]) -> tuple[str, ...]:
    checkpoint = open_checkpoint(path)
    assert sorted(checkpoint.weights) == sorted(tensors)
    for name, value in tensors.items():
        assert np.array_equal(checkpoint.weights[name].read(), value)
    return checkpoint.warnings


def test_variants(tmp_path: Path) -> None:
    half, full = _weights(1), _weights(2)
    _sharded(tmp_path, "model.fp16", half, "model.safetensors.index.fp16.json")
    assert _same(tmp_path, half) == ()
    _sharded(tmp_path, "model", full, INDEX)
    assert any("model.fp16" in w for w in _same(tmp_path, full))
    assert _same(tmp_path / "model.safetensors.index.fp16.json", half) == ()
    assert _same(tmp_path / "model.fp16-00001-of-00004.safetensors", half) == ()


def test_two_variants_need_a_choice(tmp_path: Path) -> None:
    save_file(_weights(1), tmp_path / "model.fp16.safetensors")
    save_file(_weights(2), tmp_path / "model.bf16.safetensors")
    with pytest.raises(FormatError, match="several models or variants"):
        open_checkpoint(tmp_path)
    _same(tmp_path / "model.bf16.safetensors", _weights(2))


def test_any_single_file(tmp_path: Path) -> None:
    save_file(_weights(1), tmp_path / "weights.safetensors")
    _same(tmp_path, _weights(1))
    _same(tmp_path / "weights.safetensors", _weights(1))


def test_adapters_are_not_models(tmp_path: Path) -> None:
    save_file(_weights(1), tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="no checkpoint found"):
        locate(tmp_path, "hf")


def test_safetensors_before_bin(fixtures_dir: Path, tmp_path: Path) -> None:
    source = fixtures_dir / "torch" / "hf_safetensors_sharded"
    folder = writable_copy(source / "ckpt", tmp_path / "c")
    for path in (fixtures_dir / "torch" / "hf_bin_sharded" / "ckpt").glob("pytorch_model*"):
        shutil.copyfile(path, folder / path.name)
    assert_equals_truth(open_checkpoint(folder), load_truth(source / "truth.safetensors"))


def test_shards_without_index(tmp_path: Path) -> None:
    _sharded(tmp_path, "model", _weights(1), None)
    assert any("no index" in w for w in _same(tmp_path, _weights(1)))


def test_wrapper_prefixes_come_off(tmp_path: Path) -> None:
    tensors = _weights(1)
    save_file(
        {f"module._orig_mod.{n}": v for n, v in tensors.items()}, tmp_path / "model.safetensors"
    )
    _same(tmp_path, tensors)


def test_trainer_step_and_optimizer_states(tmp_path: Path) -> None:
    tensors = _weights(1)
    save_file(tensors, tmp_path / "model.safetensors")
    states = {f"exp_avg.{n}": v * 2 for n, v in tensors.items()}
    _sharded(tmp_path, "optimizer", states, "optimizer.safetensors.index.json")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 41}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.step == 41
    assert sorted(checkpoint.optimizer["exp_avg"]) == sorted(tensors)
    assert np.array_equal(checkpoint.optimizer["exp_avg"]["b"].read(), tensors["b"] * 2)


def test_ties_of_the_config_are_replicas(tmp_path: Path) -> None:
    table = np.ones((4, 2), np.float32)
    save_file(
        {"model.embed_tokens.weight": table, "lm_head.weight": table},
        tmp_path / "model.safetensors",
    )
    assert not open_checkpoint(tmp_path).tied
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert len(checkpoint.replicas["model.embed_tokens.weight"]) == 1


# -- broken folders -------------------------------------------------------------------------------


def _copy(fixtures_dir: Path, tmp_path: Path) -> Path:
    return writable_copy(fixtures_dir / "torch" / "hf_safetensors_sharded" / "ckpt", tmp_path / "c")


def _change_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_shard(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = _copy(fixtures_dir, tmp_path)
    (folder / "model-00003-of-00006.safetensors").unlink()
    with pytest.raises(FormatError, match="model-00003-of-00006"):
        open_checkpoint(folder)
    (folder / INDEX).unlink()
    with pytest.raises(FormatError, match="5 of 6 shards; missing: 00003"):
        open_checkpoint(folder)


@pytest.mark.parametrize("case", ["hf_safetensors_sharded", "hf_bin_sharded", "dcp_hf_sharded_3r"])
def test_one_byte_cut(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    folder = writable_copy(fixtures_dir / "torch" / case / "ckpt", tmp_path / "c")
    victim = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))[1]
    cut(victim)
    with pytest.raises(FormatError, match=victim.name):
        open_checkpoint(folder)


@pytest.mark.parametrize("case", ["hf_safetensors_sharded", "hf_bin_sharded"])
def test_swapped_shards(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    folder = writable_copy(fixtures_dir / "torch" / case / "ckpt", tmp_path / "c")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    swap(files[0], files[1])
    with pytest.raises(FormatError, match="swapped"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(ghost="model-00001-of-00006.safetensors"), "ghost"),
        (lambda m: m.update(ghost="model-00009-of-00006.safetensors"), "model-00009"),
        (lambda m: m.update(ghost="../model.safetensors"), "no file of this folder"),
        (lambda m: m.update(ghost="/etc/passwd"), "no file of this folder"),
        (lambda m: m.update(ghost="..\\x.safetensors"), "no file of this folder"),
        (lambda m: m.update(ghost=7), "no file of this folder"),
        (lambda m: m.clear(), "weight_map"),
        (
            lambda m: m.update({"model.norm.weight": "model-00001-of-00006.safetensors"}),
            "model.norm.weight",
        ),
    ],
)
def test_lying_index(
    fixtures_dir: Path, tmp_path: Path, change: Callable[[dict[str, str]], Any], words: str
) -> None:
    folder = _copy(fixtures_dir, tmp_path)
    _change_index(folder, change)
    with pytest.raises(FormatError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', "{" * 100_000])
def test_malformed_index(fixtures_dir: Path, tmp_path: Path, text: str) -> None:
    folder = _copy(fixtures_dir, tmp_path)
    (folder / INDEX).write_text(text)
    with pytest.raises(FormatError, match="index"):
        open_checkpoint(folder)


def test_stale_shards_are_reported(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = _copy(fixtures_dir, tmp_path)
    stale = folder / "model-00001-of-00009.safetensors"
    shutil.copyfile(folder / "model-00001-of-00006.safetensors", stale)
    checkpoint = open_checkpoint(folder)
    assert any(stale.name in w for w in checkpoint.warnings)
    truth = fixtures_dir / "torch" / "hf_safetensors_sharded" / "truth.safetensors"
    assert_equals_truth(checkpoint, load_truth(truth))
    (folder / INDEX).unlink()
    with pytest.raises(FormatError, match="several saves"):
        open_checkpoint(folder)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    tensors = _weights(1)
    _sharded(tmp_path, "model", tensors, INDEX)
    second = tmp_path / "model-00002-of-00004.safetensors"
    save_file({**load_file(second), "a": tensors["a"]}, second)
    assert any("several files" in w for w in _same(tmp_path, tensors))
    assert len(open_checkpoint(tmp_path).replicas["a"]) == 1
    (tmp_path / INDEX).unlink()
    with pytest.raises(FormatError, match="several files"):
        open_checkpoint(tmp_path)


def _header(entries: str) -> bytes:
    text = entries.encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 64


@pytest.mark.parametrize(
    "content",
    [
        _header('{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},'
                '"b":{"dtype":"F32","shape":[8],"data_offsets":[16,48]}}'),
        _header('{"a":{"dtype":"F32","shape":[8],"data_offsets":[NaN,32]}}'),
        _header('{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,1e99]}}'),
        _header('{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,64]}}'),
        _header('{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,18446744073709551616]}}'),
        (1 << 60).to_bytes(8, "little") + b"{}",
        b"",
    ],
)  # fmt: skip
def test_hostile_headers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(MconvError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


# -- DCP in Hugging Face form ---------------------------------------------------------------------


def _pieces(fixtures_dir: Path, tmp_path: Path) -> Path:
    source = fixtures_dir / "torch" / "dcp_hf_sharded_3r"
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    return writable_copy(source / "ckpt", tmp_path / "c")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_missing_rank(fixtures_dir: Path, tmp_path: Path, rank: int) -> None:
    folder = _pieces(fixtures_dir, tmp_path)
    for path in folder.glob(f"shard-{rank:05d}-*"):
        path.unlink()
    with pytest.raises(FormatError, match=r"missing|not whole"):
        open_checkpoint(folder)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_missing_piece(fixtures_dir: Path, tmp_path: Path, rank: int) -> None:
    folder = _pieces(fixtures_dir, tmp_path)
    (folder / f"shard-{rank:05d}-model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"missing|not whole"):
        open_checkpoint(folder)


def test_pieces_of_two_saves(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = _pieces(fixtures_dir, tmp_path)
    (folder / "shard-00001-model-00002-of-00002.safetensors").rename(
        folder / "shard-00001-model-00002-of-00003.safetensors"
    )
    with pytest.raises(FormatError, match="several saves"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "info",
    [None, "", "[]", "{}", '{"w": {"saved_offsets": [0]}}', '{"w": {"saved_offsets": [-1, 0]}}',
     '{"w": {"saved_offsets": [NaN, 0]}}'],
)  # fmt: skip
def test_malformed_sharding_info(tmp_path: Path, info: str | None) -> None:
    path = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    save_file(
        {"w": np.ones((2, 2), np.float32)},
        path,
        metadata={} if info is None else {"DCP_SHARDING_INFO": info},
    )
    with pytest.raises(FormatError, match=path.name):
        open_checkpoint(tmp_path)


def test_overlapping_pieces(tmp_path: Path) -> None:
    for rank, start in ((1, 0), (2, 1)):
        info = json.dumps({"w": {"saved_offsets": [start, 0]}})
        save_file(
            {"w": np.ones((2, 2), np.float32)},
            tmp_path / f"shard-{rank:05d}-model-00001-of-00001.safetensors",
            metadata={"DCP_SHARDING_INFO": info},
        )
    with pytest.raises(FormatError, match="overlaps"):
        open_checkpoint(tmp_path)
