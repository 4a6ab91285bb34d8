"""Validation loss and a sample of text, every so many steps and at the end."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...errors import ConfigError
from ..data import TokenData
from ..hooks import Hook, Run
from ..mesh import DP
from ..metrics import Evaluation, LogHook, StepMetrics
from ..text.source import open_on_all
from ..text.tokenizer import Tokenizer, load_tokenizer
from .sample import greedy


class EvalHook(Hook):
    """Evaluates as ``[eval]`` says, and tells the log.

    Args:
        log: whose writer, on rank 0, takes the evaluations.
    """

    def __init__(self, log: LogHook) -> None:
        self._log = log
        self._data: TokenData | None = None
        self._tokenizer: Tokenizer | None = None

    def start(self, run: Run) -> None:
        """Open the validation data.

        Raises:
            ConfigError: a sample is wanted from a model that no rank can run alone.
        """
        config, wanted = run.config, run.config.eval
        if not wanted.every:
            return
        if wanted.prompt:
            if run.state.meshes.size("pp") > 1 or run.state.meshes.size("cp") > 1:
                raise ConfigError("eval.prompt needs parallel.pp = 1 and parallel.cp = 1")
            self._tokenizer = load_tokenizer(config.data.tokenizer)
        if wanted.tokens is not None:
            self._data = open_on_all(config, wanted.tokens)

    def step(self, run: Run, metrics: StepMetrics) -> None:
        """Evaluate when it is time."""
        every = run.config.eval.every
        if not every or (metrics.step % every and metrics.step != run.config.train.steps):
            return
        evaluation = Evaluation(metrics.step)
        if self._data is not None:
            loss, tokens = validation_loss(run, self._data)
            evaluation = replace(evaluation, loss=loss, tokens=tokens)
        if self._tokenizer is not None:
            prompt = run.config.eval.prompt
            evaluation = replace(
                evaluation, prompt=prompt, sample=sample(run, self._tokenizer, prompt)
            )
        if self._log.writer is not None:
            self._log.writer.evaluated(evaluation)


def validation_loss(run: Run, data: TokenData) -> tuple[float, int]:
    """Return the loss per learned token of the first ``eval.batches`` batches, and their tokens.

    Rows are shared by the data parallel ranks as in training; each row counts once.
    """
    batch, meshes = run.config.train.batch, run.state.meshes
    rank, ranks = meshes.rank(*DP), meshes.size(*DP)
    part = batch // ranks
    count = -(-data.samples // batch)
    total, tokens = 0.0, 0
    for number in range(min(count, run.config.eval.batches or count)):
        loss, labels = run.engine.evaluate(data.in_order(number * batch + rank * part, part))
        total += loss.item() * labels
        tokens += labels
    return total / max(1, tokens), tokens


def sample(run: Run, tokenizer: Tokenizer, prompt: str) -> str:
    """Return what the model says after ``prompt``; all ranks take part."""
    ids = tokenizer.encode(prompt, add_bos=True)
    limit = run.config.eval.sample_tokens
    model = run.state.parts[0]
    with torch.no_grad():
        said, _ = greedy(model, ids, limit, tokenizer.eos, run.state.meshes.device, padded=True)
    return tokenizer.decode(said)
