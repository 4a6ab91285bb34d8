"""The training loop of one rank: batch, loss, gradients, clip, step; everything else is a hook."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .batch import DataSource
from .build import build_engine, build_state
from .hooks import Hook, Run
from .lora.adapters import LoraHook
from .measure.eval import EvalHook
from .measure.imatrix import ImatrixHook
from .mesh import DP, Meshes
from .metrics import LogHook, StepMetrics
from .optim import rate, scale, set_rate, settle, total_norm
from .resume import CheckpointHook
from .settings import RunConfig
from .state import TrainState
from .text.source import open_on_all


def train(config: RunConfig, meshes: Meshes) -> Run:
    """Train as configured; every rank of ``meshes`` calls this.

    Raises:
        MconvError: the data or the configuration cannot be used.
    """
    run = new_run(config, meshes, open_on_all(config))
    log = LogHook()
    run_steps(run, [log, EvalHook(log), LoraHook(), ImatrixHook(), CheckpointHook()])
    return run


def new_run(config: RunConfig, meshes: Meshes, data: DataSource) -> Run:
    """Return a run before its first step."""
    state = build_state(config, meshes)
    return Run(config, state, build_engine(config, state), data)


def run_steps(run: Run, hooks: Sequence[Hook]) -> None:
    """Do the steps that are left, with hooks around them."""
    for hook in hooks:
        hook.start(run)
    try:
        while run.state.step < run.config.train.steps and not run.stop:
            metrics = one_step(run)
            for hook in hooks:
                hook.step(run, metrics)
    except BaseException:
        for hook in hooks:
            with suppress(Exception):  # the first error is the one to tell
                hook.fail(run)
        raise
    for hook in hooks:
        hook.stop(run)


def one_step(run: Run) -> StepMetrics:
    """Do one step on all ranks."""
    started = time.perf_counter()
    state, train = run.state, run.config.train
    meshes = state.meshes
    factor = rate(state.step, train.steps, run.config.schedule)
    set_rate(state.optimizers, factor)
    batch = run.data.batch(state.step, train.batch, meshes.rank(*DP), meshes.size(*DP))
    loss, tokens = run.engine.train(batch)
    norm = _clip(state, train.clip)
    finite = state.scale.value == 1 or bool(norm.isfinite())
    for optimizer in state.optimizers:
        if finite:
            optimizer.step()
    for _, parameter in state.all_parameters():
        parameter.grad = None
    if train.precision == "fp16":
        state.scale.update(finite)
    state.step += 1
    state.tokens += tokens
    value, seconds = loss.item(), time.perf_counter() - started
    return StepMetrics(
        step=state.step,
        loss=value,
        lr=run.config.optim.lr * factor,
        grad_norm=norm.item(),
        tokens_per_s=train.batch * train.seq_len / seconds,
        seconds=seconds,
    )


def _clip(state: TrainState, limit: float) -> Tensor:
    """Clip the gradients (and take the loss scale out of them); return their norm before."""
    tied = state.tied_copy()
    named = [p for _, p in state.all_parameters()]
    grads = settle(named)
    counted = [p.grad for p in named if p is not tied and p.grad is not None]
    like = torch.zeros(
        (),
        dtype=torch.promote_types(named[0].dtype, torch.float32),
        device=grads[0].device if grads else state.meshes.device,
    )
    norm = total_norm(counted, state.meshes.group("pp"), like) / state.scale.value
    factor = torch.ones_like(norm) / state.scale.value
    if limit:
        factor = factor * (limit / (norm + 1e-6)).clamp(max=1.0)
    if limit or state.scale.value != 1:
        scale(grads, factor)
    return norm
