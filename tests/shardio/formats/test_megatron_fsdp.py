"""``fsdp_dtensor`` of Megatron-FSDP:

keys as megatron-core writes them, in a DCP folder of torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from mconv.errors import FormatError
from mconv.shardio.coverage import prove
from mconv.shardio.registry import open_checkpoint

DIM, WIDTH, EXPERTS = 8, 6, 3


def _model() -> dict[str, Any]:
    torch.manual_seed(0)
    layer = "decoder.layers.{}.{}"
    shapes = {"embedding.word_embeddings.weight": (12, DIM), "output_layer.weight": (12, DIM),
              "decoder.final_layernorm.weight": (DIM,)}  # fmt: skip
    for i in range(2):
        shapes |= {
            layer.format(i, "self_attention.linear_qkv.weight"): (3 * DIM, DIM),
            layer.format(i, "self_attention.linear_proj.weight"): (DIM, DIM),
            layer.format(i, "mlp.shared_experts.linear_fc1.weight"): (2 * WIDTH, DIM),
        }
        for e in range(EXPERTS):
            shapes[layer.format(i, f"mlp.experts.linear_fc1.weight{e}")] = (2 * WIDTH, DIM)
            shapes[layer.format(i, f"mlp.experts.linear_fc2.weight{e}")] = (DIM, WIDTH)
    return {n: torch.randn(s) for n, s in shapes.items()}


def _split(tensors: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for name, t in tensors.items():
        if ".linear_fc1." in name:
            out[f"{name}_w"], out[f"{name}_v"] = (x.clone() for x in t.chunk(2))
        else:
            out[name] = t
    return out


def _save(folder: Path, model: dict[str, Any], **changes: Any) -> Path:
    halves = {f"module.{n}": t for n, t in _split(model).items()}
    states = {name: {"exp_avg": t * 2, "exp_avg_sq": t**2} for name, t in halves.items()}
    saved = {"model": {**halves, **changes}, "optimizer": {"state": states},
             "args": argparse.Namespace(num_layers=2, tensor_model_parallel_size=1),
             "iteration": 10}  # fmt: skip
    dcp.save(saved, checkpoint_id=folder, no_dist=True)
    return folder


def test_fsdp_dtensor(tmp_path: Path) -> None:
    model = _model()
    opened = open_checkpoint(_save(tmp_path / "iter_0000010", model))
    assert (opened.format, opened.naming, opened.step) == ("megatron_dist", "megatron", 10)
    prove(opened.weights)
    expected = {}
    for name, tensor in model.items():
        head, _, number = name.rpartition(".weight")
        if ".mlp.experts." in name:
            head = head.replace(".experts.", f".experts.local_experts.{number}.")
        expected[f"{head}.weight"] = tensor.numpy()
    assert set(opened.weights) == set(expected)
    for name, want in expected.items():
        assert np.array_equal(opened.weights[name].read(), want), name
        assert np.array_equal(opened.optimizer["exp_avg"][name].read(), want * 2), name
        assert np.array_equal(opened.optimizer["exp_avg_sq"][name].read(), want**2), name


def test_a_lost_half(tmp_path: Path) -> None:
    model = _model()
    name = "decoder.layers.1.mlp.shared_experts.linear_fc1.weight"
    lone = model.pop(name)[:WIDTH].clone()
    folder = _save(tmp_path / "iter_0000010", model, **{f"module.{name}_w": lone})
    with pytest.raises(FormatError, match="only the half _w"):
        open_checkpoint(folder)
