"""Plain torch.save files: fixtures, the containers scripts use, optimizers, broken files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.errors import FormatError, MconvError, UnsupportedError
from mconv.shardio.registry import open_checkpoint

from .torch_cases import assert_equals_truth, cut, load_truth, writable_copy


@pytest.mark.parametrize("case", ["ddp_torchsave_2r", "legacy_torchsave"])
def test_equals_truth(fixtures_dir: Path, case: str) -> None:
    folder = fixtures_dir / "torch" / case
    checkpoint = open_checkpoint(folder / "ckpt")
    assert checkpoint.format == "torch_save"
    assert_equals_truth(checkpoint, load_truth(folder / "truth.safetensors"))


def test_step_groups_and_settings(fixtures_dir: Path) -> None:
    checkpoint = open_checkpoint(fixtures_dir / "torch" / "ddp_torchsave_2r" / "ckpt")
    assert checkpoint.step == 3
    (group,) = checkpoint.scalars["param_groups"]
    assert group["lr"] == 0.01
    assert group["params"] == list(checkpoint.weights)
    assert checkpoint.args["config"]["hidden_size"] == 64


def test_shared_storage_is_a_tie(fixtures_dir: Path) -> None:
    checkpoint = open_checkpoint(fixtures_dir / "torch" / "legacy_torchsave" / "ckpt")
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}


# -- what scripts save ----------------------------------------------------------------------------


def _net(torch: Any) -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 4))


def _trained(torch: Any, groups: bool = False) -> tuple[Any, Any]:
    net = _net(torch)
    parameters: Any = net.parameters()
    if groups:
        wide = [p for p in net.parameters() if p.ndim > 1]
        narrow = [p for p in net.parameters() if p.ndim < 2]
        parameters = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(parameters)
    for _ in range(2):
        net(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    return net, optimizer


def _prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + k: v for k, v in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": _prefixed("module.", s)},
        lambda s: {"module": _prefixed("_orig_mod.", s), "step": 9},
        lambda s: {"app": {"model_state_dict": s, "args": {"lr": 0.1}}},
        lambda s: {"net": s, "ema": {"0.weight": s["0.weight"].clone()}},
    ],
)
def test_containers(tmp_path: Path, wrap: Any) -> None:
    torch = pytest.importorskip("torch")
    state = _net(torch).state_dict()
    torch.save(wrap(state), tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.weights) == list(state)
    for name, value in state.items():
        assert np.array_equal(checkpoint.weights[name].read(), value.numpy())


def test_the_biggest_container_is_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = _net(torch).state_dict()
    average = {k: v + 1 for k, v in state.items()}
    torch.save({"ema": average, "model": state, "head": {"a": torch.ones(1), "b": torch.ones(2)}},
               tmp_path / "x.pt")  # fmt: skip
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    (note,) = checkpoint.warnings
    assert "'model' (6 tensors)" in note
    assert "ema (6 tensors)" in note
    assert "head (2 tensors)" in note
    assert np.array_equal(checkpoint.weights["0.bias"].read(), state["0.bias"].numpy())


@pytest.mark.parametrize("groups", [False, True])
def test_numbered_optimizer(tmp_path: Path, groups: bool) -> None:
    torch = pytest.importorskip("torch")
    net, optimizer = _trained(torch, groups)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert checkpoint.step == 2
    for name, parameter in net.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            expected = optimizer.state[parameter][kind].numpy()
            assert np.array_equal(checkpoint.optimizer[kind][name].read(), expected), name
    named = [n for g in checkpoint.scalars["param_groups"] for n in g["params"]]
    assert sorted(named) == sorted(checkpoint.weights)


def test_lightning(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net, optimizer = _trained(torch)
    saved = {
        "epoch": 1,
        "global_step": 2,
        "state_dict": _prefixed("model.model.", net.state_dict()),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 2}],
    }
    torch.save(saved, tmp_path / "last.ckpt")
    checkpoint = open_checkpoint(tmp_path / "last.ckpt")
    assert list(checkpoint.weights) == [f"model.{n}" for n in net.state_dict()]
    assert sorted(checkpoint.optimizer) == ["exp_avg", "exp_avg_sq"]
    assert checkpoint.args["epoch"] == 1


def test_optimizer_beside_by_names(tmp_path: Path) -> None:
    """accelerate's full state dict: pytorch_model_fsdp.bin and optimizer.bin keyed by names."""
    torch = pytest.importorskip("torch")
    net, optimizer = _trained(torch)
    names = [n for n, _ in net.named_parameters()]
    state = {n: optimizer.state_dict()["state"][i] for i, n in enumerate(names)}
    groups = [{"lr": 0.5, "params": names}]
    torch.save(net.state_dict(), tmp_path / "pytorch_model_fsdp.bin")
    torch.save({"state": state, "param_groups": groups}, tmp_path / "optimizer.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.optimizer["exp_avg"]) == sorted(names)
    assert checkpoint.scalars["param_groups"] == groups


def test_numbers_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net, optimizer = _trained(torch)
    state = optimizer.state_dict()
    state["state"][0], state["state"][1] = state["state"][1], state["state"][0]
    torch.save({"model": net.state_dict(), "optimizer": state}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert not checkpoint.optimizer
    assert any("numbered" in w for w in checkpoint.warnings)


def test_any_classes_beside_the_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    args = argparse.Namespace(lr=0.1, out=Path("/x"), dtype=torch.bfloat16)
    torch.save({"model": _net(torch).state_dict(), "args": args}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert checkpoint.args["args"]["lr"] == 0.1


def test_views_and_transposes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    torch.save({"a": base.t(), "b": base[1:3, 2:5], "c": base.half()}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert np.array_equal(checkpoint.weights["a"].read(), base.numpy().T)
    assert np.array_equal(checkpoint.weights["b"].read(), base.numpy()[1:3, 2:5])
    assert not checkpoint.tied


def test_whole_module(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = _net(torch)
    torch.save(net, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert sorted(checkpoint.weights) == sorted(net.state_dict())


# -- broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["ddp_torchsave_2r", "legacy_torchsave"])
def test_one_byte_cut(fixtures_dir: Path, tmp_path: Path, case: str) -> None:
    folder = writable_copy(fixtures_dir / "torch" / case / "ckpt", tmp_path / "c")
    (victim,) = folder.iterdir()
    cut(victim)
    with pytest.raises(FormatError, match=victim.name):
        open_checkpoint(folder)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_hostile_pickles_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"model": _net(torch).state_dict(), "bomb": _Bomb()}, tmp_path / "x.pt")
    open_checkpoint(tmp_path / "x.pt").args["bomb"]
    torch.save(_Bomb(), tmp_path / "y.pt")
    with pytest.raises(MconvError, match=r"y\.pt"):
        open_checkpoint(tmp_path / "y.pt")
    assert capsys.readouterr().out == ""


def test_exotic_tensors_are_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    sparse = torch.eye(3).to_sparse()
    torch.save({"model": {**_net(torch).state_dict(), "s": sparse}}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedError, match="'s' is a sparse tensor"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [{}, {"a": 1}, [1, 2], "text"])
def test_no_tensors(tmp_path: Path, content: Any) -> None:
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"x\.pt"):
        open_checkpoint(tmp_path / "x.pt")
