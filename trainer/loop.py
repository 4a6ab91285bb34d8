"""The training loop of one rank: batch, loss, gradients, clip, step; metrics and a checkpoint."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import checkpoint
from .config import RunConfig
from .data import TokenData, open_tokens
from .init import materialize
from .loss import all_sum, count_labels, token_loss
from .mesh import DP, FSDP, Meshes
from .metrics import MetricsWriter, StepMetrics
from .model import Decoder
from .optim import build_optimizer
from .parallel import shard
from .schedule import rate
from .tokenizer import load_tokenizer


def train(config: RunConfig, meshes: Meshes) -> Path:
    """Train from scratch and save; every rank of ``meshes`` calls this.

    Returns:
        The folder of the final checkpoint.

    Raises:
        MconvError: the data or the configuration cannot be used.
    """
    rank, world_size = meshes.rank(*DP), meshes.degrees.dp
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = open_tokens(
        config.data.tokens, config.train.seq_len, config.train.seed, config.model.vocab_size
    )
    with torch.device("meta"):
        model = Decoder(config.model)
    shard(model, meshes.sub(*FSDP))
    materialize(model, config.train.seed)
    optimizer = build_optimizer(model, config.optim)
    with ExitStack() as stack:
        log = stack.enter_context(MetricsWriter(config.save.folder)) if rank == 0 else None
        for step in range(config.train.steps):
            metrics = _step(config, model, optimizer, data, step, rank, world_size)
            if log is not None:
                log.write(metrics)
    special = {"bos_token_id": tokenizer.bos_id(), "eos_token_id": tokenizer.eos_id()}
    return checkpoint.save(
        config.save.folder, config.train.steps, model, optimizer, config.data.tokenizer, special
    )


def _step(
    config: RunConfig,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    data: TokenData,
    step: int,
    rank: int,
    world_size: int,
) -> StepMetrics:
    started = time.perf_counter()
    lr = config.optim.lr * rate(step, config.train.steps, config.schedule)
    for group in optimizer.param_groups:
        group["lr"] = lr
    batch = data.batch(step, config.train.batch, rank, world_size)
    loss = token_loss(model(batch.inputs), batch.labels, count_labels(batch.labels))
    torch.autograd.backward(loss)
    norm = _whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip))
    optimizer.step()
    optimizer.zero_grad()
    total = all_sum(loss)
    seconds = time.perf_counter() - started
    return StepMetrics(
        step=step + 1,
        loss=total.item(),
        lr=lr,
        grad_norm=norm.item(),
        tokens_per_s=config.train.batch * config.train.seq_len / seconds,
        seconds=seconds,
    )


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
