"""Any checkpoint starts a run under any layout: every rank has its region of the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from mconv.convert.to_gguf import to_gguf  # noqa: E402
from mconv.errors import ConfigError  # noqa: E402
from mconv.trainer.build import build_state  # noqa: E402
from mconv.trainer.delivery.demo import documents  # noqa: E402
from mconv.trainer.mesh import build_meshes, process_group  # noqa: E402
from mconv.trainer.moe import expert_names  # noqa: E402
from mconv.trainer.settings import RunConfig, load_config  # noqa: E402
from mconv.trainer.settings.degrees import resolve  # noqa: E402
from mconv.trainer.settings.model import ModelConfig  # noqa: E402
from mconv.trainer.text.train_tokenizer import train_tokenizer  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from .ranks import Ranks  # noqa: E402
from .toys import FULL_TP, plain_model, run_config, world_size  # noqa: E402

Weights = dict[str, np.ndarray]


def write_hf(folder: Path, config: ModelConfig, seed: int) -> Weights:
    """Write a random model as Hugging Face does; return the weights under our names."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    toy = replace(run_config(), model=config)
    shapes = {n: p.shape for n, p in plain_model(toy).named_parameters()}
    ours = {n: draw.standard_normal(tuple(s)).astype(np.float32) for n, s in shapes.items()}
    theirs = {}
    for name, values in ours.items():
        stack = expert_names(config, name)
        theirs |= dict(zip(stack, values, strict=True)) if stack else {name: values}
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return ours


def loaded(rank: int, world: int, store: Path, config: RunConfig) -> Weights:
    with process_group(rank, world, store):
        state = build_state(config, build_meshes(resolve(config, world), "cpu"))
        return {
            n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().numpy()
            for n, p in state.all_parameters()
        }


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("tied", {"dp_shard": 2, **FULL_TP}),
        ("tied", {"pp": 2, "schedule": "ZBVZeroBubble"}),
        ("gqa", {"zero": 1}),
        ("moe", {"dp_shard": 2, "ep": 2, "tp": 2}),
        ("mixtral", {"dp_shard": 4, "ep": 2}),
    ],
    ids=str,
)
def test_hugging_face(ranks: Ranks, tmp_path: Path, model: str, layout: dict[str, Any]) -> None:
    config = run_config(model, {"dtype": "float32"}, **layout)
    expected = write_hf(tmp_path / "hf", config.model, 1)
    config = replace(config, model=replace(config.model, init_from=tmp_path / "hf"))
    got: Weights = {}
    for one in ranks(loaded, world_size(layout), config):
        got |= one
    if layout.get("pp"):
        head = got.pop("lm_head.weight")
        np.testing.assert_array_equal(head, expected["model.embed_tokens.weight"])
    assert set(got) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


def test_gguf(ranks: Ranks, tmp_path: Path) -> None:
    """Llama's heads are permuted in GGUF; the names are others; the sizes are found there."""
    config = run_config("llama", {"dtype": "float32"})
    config = replace(config, model=replace(config.model, vocab_size=320))
    expected = write_hf(tmp_path / "hf", config.model, 2)
    train_tokenizer(documents(), tmp_path / "hf", 320)
    to_gguf(tmp_path / "hf", tmp_path / "model.gguf", "f32")
    config = replace(config, model=replace(config.model, init_from=tmp_path / "model.gguf"))
    for one in ranks(loaded, 2, config):
        assert set(one) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(one[name], values, err_msg=name)


def test_misfits_are_named(tmp_path: Path) -> None:
    from mconv.trainer.init import load_weights, open_weights

    config = run_config("tied")
    write_hf(tmp_path / "hf", config.model, 1)
    checkpoint = open_weights(tmp_path / "hf", config.model)
    wide = replace(config, model=replace(config.model, intermediate_size=40))
    with pytest.raises(ConfigError, match=r"has shape \[24, 16\], but the model has \[40, 16\]"):
        load_weights([plain_model(wide)], checkpoint)
    normed = replace(config, model=replace(config.model, model_type="qwen3"))
    with pytest.raises(ConfigError, match=r"no weight model\.layers\.0\.self_attn\.q_norm\.weight"):
        load_weights([plain_model(normed)], checkpoint)


def test_sizes_come_from_the_checkpoint(tmp_path: Path) -> None:
    config = run_config("moe").model
    write_hf(tmp_path / "hf", config, 1)
    rest = """
        [train]
        steps = 1
        seq_len = 4
        batch = 1
        [optim]
        lr = 0.1
        [data]
        tokens = "t"
        tokenizer = "t"
        [save]
        folder = "out"
    """
    run = tmp_path / "run.toml"
    run.write_text('[model]\npath = "hf"\nrouter_aux_loss_coef = 0.5\n' + rest)
    assert load_config(run).model == replace(config, router_aux_loss_coef=0.5)
    run.write_text('[model]\ninit_from = "hf"\n' + rest)
    loaded = load_config(run).model
    assert loaded == replace(config, init_from=tmp_path / "hf")
    run.write_text('[model]\npath = "nowhere"\n' + rest)
    with pytest.raises(ConfigError, match=r"nowhere/config\.json: cannot be read"):
        load_config(run)
