"""What the tests of both Megatron formats share: truths, the comparison, copies of fixtures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mconv.convert.naming import from_hf, to_hf
from mconv.shardio.checkpoint import Checkpoint
from mconv.shardio.compare import check_replicas
from mconv.shardio.coverage import prove
from mconv.shardio.tensor import LazyTensor
from safetensors.numpy import load_file

VOCAB = 317
EMBEDDING = "embedding.word_embeddings.weight"


def values(tensor: LazyTensor) -> np.ndarray:
    """All elements as float32."""
    return tensor.read().astype(np.float32)


def check_truth(ckpt: Checkpoint, case: Path) -> None:
    """Everything the case knows: weights and optimizer in HF names, coverage, copies, the way back.

    After an optimizer step the truth (computed by a second model) may round differently in the last
    bit; everything else is exact.
    """
    prove(ckpt.weights, case)
    check_replicas(ckpt.weights, ckpt.replicas)
    hf = to_hf(ckpt, vocab_size=VOCAB)
    truth = {k: v.astype(np.float32) for k, v in load_file(case / "truth.safetensors").items()}
    assert set(hf.weights) == set(truth)
    stepped = (case / "truth_optim.safetensors").exists()
    for name, expected in truth.items():
        last_bit = 2.0**-8 if hf.weights[name].dtype.itemsize == 2 else 1e-6
        slack = {"rtol": last_bit, "atol": 1e-6} if stepped else {"rtol": 0.0, "atol": 0.0}
        np.testing.assert_allclose(values(hf.weights[name]), expected, **slack, err_msg=name)
    if stepped:
        _check_optimizer(hf, case)
    check_way_back(ckpt)


def _check_optimizer(hf: Checkpoint, case: Path) -> None:
    truth = load_file(case / "truth_optim.safetensors")
    states = {f"{s}.{n}": t for s, named in hf.optimizer.items() for n, t in named.items()}
    assert set(states) == set(truth)
    for name, expected in truth.items():
        assert states[name].dtype == np.float32
        np.testing.assert_allclose(values(states[name]), expected, rtol=0, atol=1e-6, err_msg=name)


def check_way_back(ckpt: Checkpoint) -> None:
    """``from_hf(to_hf(x)) == x`` bit for bit, padding kept, weights and optimizer."""
    rows = ckpt.weights[EMBEDDING].shape[0]
    back = from_hf(to_hf(ckpt, vocab_size=rows), "megatron", padded_vocab_size=rows)
    same(back.weights, ckpt.weights)
    assert set(back.optimizer) == set(ckpt.optimizer)
    for state, tensors in ckpt.optimizer.items():
        same(back.optimizer[state], tensors)
    assert back.tied == ckpt.tied


def same(a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor]) -> None:
    """Equal names, dtypes and bytes."""
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert tensor.read().tobytes() == b[name].read().tobytes(), name


def copy_of(case: Path, kind: str, target: Path) -> Path:
    """A writable copy of a fixture's run folder, without the config beside it."""
    shutil.copytree(case / kind, target / kind)
    for path in [target / kind, *(target / kind).rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target / kind


class Bomb:
    """Runs a command when a naive loader unpickles it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)
