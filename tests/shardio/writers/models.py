"""Random checkpoints for the tests of the writers: odd shapes, every training precision, groups."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from mconv.shardio import Checkpoint, from_array, open_checkpoint
from mconv.shardio.dtypes import parse
from mconv.shardio.layout import Layout
from mconv.shardio.staging import write_folder
from mconv.shardio.stream import Limits
from mconv.shardio.tensor import LazyTensor
from mconv.shardio.writers import get_writer

SETTINGS = {
    "lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False,
    "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
    "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip


def make(
    seed: int,
    *,
    dtype: str = "bfloat16",
    optimizer: bool = True,
    groups: int = 2,
    frozen: bool = False,
    tied: bool = False,
    layers: int = 2,
) -> Checkpoint:
    """A checkpoint in memory with Hugging Face names in the order of a Llama model."""
    rng = np.random.default_rng(seed)
    pick = random.Random(seed)
    h, w, vocab = pick.randint(3, 13), pick.randint(3, 17), pick.randint(5, 41)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h)}
    for i in range(layers):
        for name, shape in (
            ("self_attn.q_proj.weight", (h, h)), ("self_attn.q_proj.bias", (h,)),
            ("self_attn.o_proj.weight", (h, h)), ("mlp.gate_proj.weight", (w, h)),
            ("mlp.up_proj.weight", (w, h)), ("mlp.down_proj.weight", (h, w)),
            ("input_layernorm.weight", (h,)), ("post_attention_layernorm.weight", (h,)),
        ):  # fmt: skip
            shapes[f"model.layers.{i}.{name}"] = shape
    shapes["model.norm.weight"] = (h,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, h)
    masters = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    weights = {n: x.astype(parse(dtype)) for n, x in masters.items()}
    trained = [n for n in shapes if not (frozen and "layers.0" in n)]
    states: dict[str, dict[str, LazyTensor]] = {}
    if optimizer:
        if dtype != "float32":
            states["master"] = {n: from_array(masters[n]) for n in trained}
        for state in ("exp_avg", "exp_avg_sq"):
            states[state] = {
                n: from_array(rng.random(shapes[n]).astype(np.float32)) for n in trained
            }
    return Checkpoint(
        path=Path("memory"),
        format="dcp",
        weights={n: from_array(x) for n, x in weights.items()},
        optimizer=states,
        step=pick.randint(1, 9999),
        args={"training_dtype": dtype} if dtype != "float32" else {},
        scalars={"param_groups": _groups(trained, shapes, groups)} if optimizer else {},
        tied={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        config={"model_type": "llama", "vocab_size": vocab, "tie_word_embeddings": tied},
    )


def _groups(
    trained: list[str], shapes: dict[str, tuple[int, ...]], count: int
) -> list[dict[str, object]]:
    if count == 1:
        return [{**SETTINGS, "params": trained}]
    wide = [n for n in trained if len(shapes[n]) > 1]
    plain = [n for n in trained if len(shapes[n]) == 1]
    return [{**SETTINGS, "params": wide}, {**SETTINGS, "weight_decay": 0.0, "params": plain}]


def write(ckpt: Checkpoint, layout: Layout, target: Path, threads: int = 2) -> Path:
    """Write a checkpoint that has the writer's names already."""
    planned = get_writer(layout.format).plan(ckpt, layout)
    write_folder(target, planned.files, plan="test", force=True, limits=Limits(1 << 20, threads))
    return target


def through(ckpt: Checkpoint, layout: Layout, target: Path) -> Checkpoint:
    """Write and read back."""
    return open_checkpoint(write(ckpt, layout, target))


def assert_same(got: LazyTensor, want: LazyTensor, name: str) -> None:
    """The same bits."""
    assert got.shape == want.shape, name
    assert got.dtype == want.dtype, name
    assert got.read().tobytes() == want.read().tobytes(), name
