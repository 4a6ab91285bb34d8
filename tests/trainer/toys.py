"""Tiny runs for tests: configurations, a data source, and the plain loop that all must equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mconv.trainer.batch import IGNORE, Batch
from mconv.trainer.init import materialize
from mconv.trainer.mesh import build_meshes, process_group
from mconv.trainer.model import Decoder
from mconv.trainer.optim import rate
from mconv.trainer.settings import RunConfig
from mconv.trainer.settings.degrees import resolve
from mconv.trainer.settings.model import ModelConfig
from mconv.trainer.settings.sections import (
    DataConfig,
    OptimConfig,
    ParallelConfig,
    SaveConfig,
    ScheduleConfig,
    TrainConfig,
)

from .ranks import Ranks

FULL_TP = {"tp": 2, "sp": True, "loss_parallel": True}

#: ``check`` with the session's ranks, a fixture.
Check = Callable[..., None]
_FOUND: dict[Any, list[tuple[float, float]]] = {}

SIZES: dict[str, Any] = {
    "vocab_size": 61,  # divides by nothing
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "dense": {"model_type": "qwen2"},
    "tied": {"tie_word_embeddings": True},
    "gqa": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 6},
    "moe": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "num_experts": 4,
        "moe_intermediate_size": 12,
        "router_aux_loss_coef": 0.01,
    },
    "mixtral": {"model_type": "mixtral", "num_experts": 4, "sliding_window": 5},
    "gemma": {
        "model_type": "gemma",
        "tie_word_embeddings": True,
        "head_dim": 6,
        "hidden_act": "gelu_pytorch_tanh",
    },
}


def run_config(
    model: str = "dense", train: dict[str, Any] | None = None, **parallel: Any
) -> RunConfig:
    """A run of 3 float64 steps with accumulation."""
    settings: dict[str, Any] = {
        "steps": 3,
        "seq_len": 8,
        "batch": 8,
        "micro_batch": 2,
        "dtype": "float64",
        "clip": 0.05,
        "threads": 1,
        **(train or {}),
    }
    return RunConfig(
        model=ModelConfig(**{**SIZES, **MODELS[model]}),
        train=TrainConfig(**settings),
        parallel=ParallelConfig(**parallel),
        optim=OptimConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup=2),
        data=DataConfig(tokens=Path("none"), tokenizer=Path("none")),
        save=SaveConfig(folder=Path("none")),
    )


@dataclass(frozen=True)
class ToyData:
    """Random rows; some labels are masked, unevenly, and rows hold two documents if asked to."""

    config: RunConfig
    packed: bool = False

    @property
    def samples(self) -> int:
        return 1 << 30

    def fingerprint(self) -> str:
        return "toy"

    def batch(self, step: int, batch: int, rank: int, world_size: int) -> Batch:
        model, seq = self.config.model, self.config.train.seq_len
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(0, model.vocab_size, (batch, seq + 1), generator=draw)
        labels = ids[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=draw) < 0.2] = IGNORE
        labels[: batch // 2, : seq // 2] = IGNORE
        positions = torch.arange(seq).expand(batch, -1).clone()
        documents = None
        if self.packed:
            cut = torch.randint(1, seq, (batch, 1), generator=draw)
            documents = (positions >= cut).long()
            positions = positions - documents * cut
        part = batch // world_size
        return Batch(ids[:, :-1], labels, positions, documents).rows(rank * part, part)


def plain_loop(config: RunConfig, data: ToyData) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step, without any of the trainer's loop.

    The whole batch at once, torch's own mean, clipping and AdamW.
    """
    train, model = config.train, plain_model(config)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        weight_decay=config.optim.weight_decay,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
        foreach=False,
    )
    for layer in model.model.layers.values():
        layer.feed_forward.balance = config.model.router_aux_loss_coef / (
            config.model.num_hidden_layers * train.batch
        )
    history = []
    for step in range(train.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * rate(step, train.steps, config.schedule)
        batch = data.batch(step, train.batch, 0, 1)
        logits = model(batch.inputs, batch.positions, batch.documents)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


def plain_model(config: RunConfig) -> Decoder:
    """The whole initial model."""
    with torch.device("meta"):
        model = Decoder(config.model).to(getattr(torch, config.train.dtype))
    materialize(model, config.train.seed)
    return model


def trained(
    rank: int, world_size: int, store: Path, config: RunConfig, packed: bool = False
) -> list[tuple[float, float]]:
    """Train on a rank; return loss and gradient norm of each step."""
    from mconv.trainer.loop import new_run, one_step

    with process_group(rank, world_size, store):
        meshes = build_meshes(resolve(config, world_size), "cpu")
        run = new_run(config, meshes, ToyData(config, packed))
        steps = [one_step(run) for _ in range(config.train.steps)]
    return [(s.loss, s.grad_norm) for s in steps]


def reference(
    rank: int, world_size: int, store: Path, config: RunConfig, packed: bool = False
) -> list[tuple[float, float]]:
    """The plain loop, on a rank (``pytest`` itself must not compute gradients)."""
    return plain_loop(config, ToyData(config, packed))


def single(config: RunConfig) -> RunConfig:
    """The same run without any parallelism."""
    return replace(config, parallel=ParallelConfig())


def world_size(layout: dict[str, Any]) -> int:
    """How many ranks a layout needs; two for data parallelism alone."""
    degrees = [layout.get(n, 1) for n in ("dp_replicate", "tp", "cp", "pp")]
    rest = 1 if np.prod(degrees) > 1 else 2
    return int(np.prod(degrees)) * layout.get("dp_shard", rest)


def check(
    ranks: Ranks,
    layout: dict[str, Any],
    model: str,
    packed: bool = False,
    tolerance: float = 1e-12,
    world: int = 0,
    like: dict[str, Any] | None = None,
    **train: Any,
) -> None:
    """Compare a layout with the plain loop (whose settings ``like`` changes)."""
    plain = run_config(model, {**train, **(like or {})})
    if (plain, packed) not in _FOUND:
        _FOUND[plain, packed] = ranks(reference, 1, single(plain), packed)[0]
    config = run_config(model, train, **layout)
    for one in ranks(trained, world or world_size(layout), config, packed):
        np.testing.assert_allclose(one, _FOUND[plain, packed], rtol=tolerance, atol=0)


def dump_config(config: RunConfig, folder: Path) -> str:
    """Return the TOML text that ``load_config`` reads back as ``config`` from a file in ``folder``.

    Paths inside the (absolute) folder are written relative to it.
    """
    return "\n".join(
        line for name, section in asdict(config).items() for line in _table(name, section, folder)
    )


def _table(name: str, section: Mapping[str, Any], folder: Path) -> list[str]:
    plain = {k: v for k, v in section.items() if v is not None and not isinstance(v, dict)}
    lines = [f"[{name}]", *(f"{key} = {_toml(value, folder)}" for key, value in plain.items()), ""]
    for key, value in section.items():
        if isinstance(value, dict):
            lines += _table(f"{name}.{key}", value, folder)
    return lines


def _toml(value: object, folder: Path) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(v, folder) for v in value)}]"
    if isinstance(value, Path):
        inside = value.relative_to(folder) if value.is_relative_to(folder) else value
        return json.dumps(inside.as_posix(), ensure_ascii=False)  # TOML's escapes are JSON's
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
