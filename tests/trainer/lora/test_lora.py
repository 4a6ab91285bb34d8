"""LoRA: the same under every layout, what PEFT computes, and files that PEFT reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mconv.errors import ConfigError, FormatError  # noqa: E402
from mconv.shardio import open_checkpoint  # noqa: E402
from mconv.trainer.init import materialize  # noqa: E402
from mconv.trainer.loop import new_run, one_step  # noqa: E402
from mconv.trainer.lora.adapters import (  # noqa: E402
    adapted,
    add_adapters,
    load_adapter,
    save_adapter,
)
from mconv.trainer.mesh import build_meshes, process_group  # noqa: E402
from mconv.trainer.model import Decoder  # noqa: E402
from mconv.trainer.settings import RunConfig  # noqa: E402
from mconv.trainer.settings.degrees import resolve  # noqa: E402
from mconv.trainer.settings.sections import LoraConfig  # noqa: E402

from ..ranks import Ranks  # noqa: E402
from ..toys import ToyData, run_config  # noqa: E402

ALONE: dict[str, Any] = {}  # what one process trains, by model
TP = {"tp": 2, "sp": True, "loss_parallel": True}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(rank=3, alpha=5.0, targets=ALL, dropout=0.25, rslora=True)


def config_of(model: str = "dense", lora: LoraConfig = LORA, **more: Any) -> RunConfig:
    train = {"clip": 0.0, **more.pop("train", {})}
    return replace(run_config(model, train, **more), lora=lora)


def trained(
    rank: int, world_size: int, store: Path, config: RunConfig, folder: Path
) -> list[tuple[float, float]]:
    """Train some steps and save the adapter."""
    with process_group(rank, world_size, store):
        meshes = build_meshes(resolve(config, world_size), "cpu")
        run = new_run(config, meshes, ToyData(config))
        before = {n: p.detach().clone() for n, p in run.state.all_parameters()}
        steps = [one_step(run) for _ in range(config.train.steps)]
        for name, parameter in run.state.all_parameters():
            assert parameter.requires_grad == (".lora_" in name)
            if ".lora_" not in name:
                assert torch.equal(_local(before[name]), _local(parameter))
        save_adapter(folder, config, run.state)
    return [(s.loss, s.grad_norm) for s in steps]


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def saved(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("world", "layout", "model"),
    [
        (2, {}, "tied"),
        (2, {"zero": 1}, "dense"),
        (2, {"zero": 0, "train": {"checkpointing": "full"}}, "gqa"),
        (2, TP, "gqa"),
        (2, {"tp": 2, "train": {"checkpointing": "selective"}}, "dense"),
        (2, {"cp": 2}, "dense"),
        (2, {"pp": 2, "train": {"checkpointing": "full"}}, "tied"),
        (4, {"dp_shard": 2, **TP}, "tied"),
        (2, {"pp": 2, "schedule": "InterleavedZeroBubble"}, "dense"),
        (4, {"dp_shard": 2, "pp": 2}, "gqa"),
    ],
)
def test_layouts_train_the_same_adapter(
    ranks: Ranks, tmp_path: Path, world: int, layout: dict[str, Any], model: str
) -> None:
    if model not in ALONE:
        alone = config_of(model, train={"micro_batch": 8})
        ALONE[model] = ranks(trained, 1, alone, tmp_path / "alone")[0], saved(tmp_path / "alone")
    expected, one = ALONE[model]
    config = config_of(model, **layout)
    for got in ranks(trained, world, config, tmp_path / "cut"):
        np.testing.assert_allclose(got, expected, rtol=1e-11)
    other = saved(tmp_path / "cut")
    assert list(one) == list(other)
    assert len(one) == 2 * 7 * 4
    for name, values in one.items():
        np.testing.assert_allclose(other[name], values, rtol=1e-9, atol=1e-15)


def test_experts_keep_their_weights(ranks: Ranks, tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, targets=("q_proj", "v_proj"))
    alone = ranks(trained, 1, config_of("moe", lora), tmp_path / "a")[0]
    for got in ranks(trained, 2, config_of("moe", lora, ep=2), tmp_path / "b"):
        np.testing.assert_allclose(got, alone, rtol=1e-11)
    with torch.device("meta"):
        model = Decoder(config_of("moe").model)
    with pytest.raises(ConfigError, match="'down_proj'; there are k_proj, o_proj, q_proj, v_proj"):
        add_adapters(model, LORA, 0)


def made(config: RunConfig) -> Decoder:
    """A float32 model with adapters whose B is not zero."""
    with torch.device("meta"):
        model = Decoder(config.model)
    add_adapters(model, config.lora, 0)
    materialize(model, 0)
    draw = torch.Generator().manual_seed(1)
    for _, layer in adapted(model):
        layer.lora_B.weight.data.normal_(0, 0.1, generator=draw)
    return model


def written(rank: int, world_size: int, store: Path, config: RunConfig, folder: Path) -> Any:
    """Save base and adapter of ``made``; return its logits and merged weights."""
    from mconv.trainer.state import TrainState
    from safetensors.torch import save_file

    config = replace(config, model=replace(config.model, init_from=folder / "base"))
    with process_group(rank, world_size, store):
        model = made(config)
        state = TrainState(build_meshes(resolve(config, world_size), "cpu"), [model])
        save_adapter(folder / "adapter", config, state)
        base = {n: p for n, p in model.state_dict().items() if ".lora_" not in n}
        (folder / "base").mkdir()
        save_file(base, folder / "base" / "model.safetensors", {"format": "pt"})
        (folder / "base" / "config.json").write_text(json.dumps(config.model.to_hf()))
        with torch.no_grad():
            logits = model(torch.arange(20)[None] + 7)
        merged = {
            f"{n}.weight": (m.weight + (m.lora_B.weight @ m.lora_A.weight) * m.scale)
            .detach()
            .numpy()
            for n, m in adapted(model)
        }
        return logits.numpy(), merged


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_and_merges_the_same(ranks: Ranks, tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = config_of("gqa", replace(LORA, rslora=rslora, dropout=0.0))
    [(logits, merged)] = ranks(written, 1, config, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = model(torch.arange(20)[None] + 7).logits.numpy()
    np.testing.assert_allclose(logits, theirs, atol=1e-6)
    state = model.merge_and_unload().state_dict()
    weights = open_checkpoint(tmp_path / "base", adapter=tmp_path / "adapter").weights
    alone = open_checkpoint(tmp_path / "adapter").weights  # names its base
    assert len(merged) == 28
    for name, values in merged.items():
        np.testing.assert_array_equal(values, state[name].numpy())
        np.testing.assert_array_equal(weights[name].read(), values)
        np.testing.assert_array_equal(alone[name].read(), values)


def test_adapters_are_loaded(ranks: Ranks, tmp_path: Path) -> None:
    config = config_of("gqa")
    ranks(written, 1, config, tmp_path)
    with torch.device("meta"):
        model = Decoder(config.model)
    add_adapters(model, config.lora, 0)
    materialize(model, 3)
    load_adapter(model, tmp_path / "adapter")
    other = dict(adapted(made(config)))
    for name, layer in adapted(model):
        for kind in ("lora_A", "lora_B"):
            assert torch.equal(getattr(layer, kind).weight, getattr(other[name], kind).weight)
    with torch.device("meta"):
        model = Decoder(config.model)
    add_adapters(model, replace(config.lora, rank=4), 0)
    with pytest.raises(FormatError, match=r"rank and lora\.targets must be those of the adapter"):
        load_adapter(model, tmp_path / "adapter")
    with pytest.raises(FormatError, match="is no adapter of PEFT"):
        load_adapter(model, tmp_path)


def test_peft_starts_from_the_same_distribution() -> None:
    factor = next(layer for _, layer in adapted(made(config_of()))).lora_A.weight
    bound = factor.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
    assert 0.8 * bound < factor.abs().max() <= bound


def test_dropout_keeps_the_right_part() -> None:
    from mconv.trainer.lora.dropout import RowDropout, Rows

    rows = Rows(None)
    rows.numbers = torch.arange(50, 90)
    one = torch.ones(40, 16, 32, dtype=torch.float64)
    kept = RowDropout(0.25, "a", rows)(one)
    assert set(kept.unique().tolist()) == {0.0, 4 / 3}
    for dims in ((1, 2), (0, 2), (0, 1)):
        share = (kept > 0).double().mean(dims)
        assert (share - 0.75).abs().max() < 0.13
    assert (kept > 0).double().mean() == pytest.approx(0.75, abs=0.01)
    rows.numbers = torch.tensor([51])
    assert torch.equal(RowDropout(0.25, "a", rows)(one[:1]), kept[1:2])
    rows.numbers = torch.arange(50, 90)
    assert not torch.equal(RowDropout(0.25, "b", rows)(one), kept)
    flat = (kept > 0).double().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    correlation = torch.corrcoef(flat) - torch.eye(40)
    assert correlation.abs().max() < 0.2
