"""What a run tells while it runs.

``metrics.jsonl`` and ``metrics.csv`` have a line per logged step, ``evals.jsonl`` one per
evaluation; TensorBoard and Weights & Biases get the same when asked for. After a resume the lines
of steps that will come again are taken back. A loss that is no number ends the run.
"""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from ..errors import TrainError
from .hooks import Hook, Run
from .measure.sinks import Sink, sinks
from .planning.flops import flops_per_token, peak_flops

if TYPE_CHECKING:
    pass

FILE = "metrics.jsonl"
TABLE = "metrics.csv"
EVALS = "evals.jsonl"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step."""

    step: int  # counted from 1
    loss: float  # per learned token, in nats
    lr: float
    grad_norm: float  # before clipping
    tokens_per_s: float  # of all ranks
    seconds: float  # of this step
    tflops: float | None = None  # work per second and device; None where it was not computed
    mfu: float | None = None  # the same as a part of the device's peak; None where not known
    memory: int | None = None  # most bytes in use so far: of the device, or on CPU the process


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation: the loss per learned token (None without validation data), and a sample."""

    step: int
    loss: float | None = None
    tokens: int = 0
    prompt: str = ""
    sample: str = ""


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Writes the metrics of a run. Only rank 0 has one.

    Args:
        folder: of the run.
        after: the step it goes on from; what the files say of later steps is dropped.
        sinks: further takers of numbers.
    """

    def __init__(self, folder: Path, after: int = 0, sinks: tuple[Sink, ...] = ()) -> None:
        kept = [m for m in read_metrics(folder) if m.step <= after]
        evals = [e for e in read_evaluations(folder) if e.step <= after]
        if not evals:
            (folder / EVALS).unlink(missing_ok=True)
        self._files: dict[str, TextIO] = {}
        self._folder, self._sinks = folder, sinks
        self._rows = csv.DictWriter(self._file(TABLE), [f.name for f in fields(StepMetrics)])
        self._rows.writeheader()
        self._file(FILE)
        for metrics in kept:
            self._put(FILE, metrics)
        for evaluation in evals:
            self._put(EVALS, evaluation)

    def write(self, metrics: StepMetrics) -> None:
        """Append a line and hand it to the system, so that readers see it at once."""
        self._put(FILE, metrics)
        numbers = {k: v for k, v in asdict(metrics).items() if k != "step" and v is not None}
        for sink in self._sinks:
            sink(metrics.step, numbers)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Append an evaluation."""
        self._put(EVALS, evaluation)
        if evaluation.loss is not None:
            for sink in self._sinks:
                sink(evaluation.step, {"eval_loss": evaluation.loss})

    def _file(self, name: str) -> TextIO:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("w", encoding="utf-8", newline="")
        return self._files[name]

    def _put(self, name: str, row: StepMetrics | Evaluation) -> None:
        self._file(name).write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        if name == FILE:
            self._rows.writerow(asdict(row))
        for file in self._files.values():
            file.flush()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def read_metrics(folder: Path) -> list[StepMetrics]:
    """Return the whole lines that a run has written so far."""
    return [StepMetrics(**row) for row in _rows(folder / FILE)]


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Return the evaluations of a run so far."""
    return [Evaluation(**row) for row in _rows(folder / EVALS)]


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Follower:
    """Tells of the metrics of a run as they appear; call it now and then."""

    def __init__(self, folder: Path, tell: Callable[[StepMetrics], None]) -> None:
        self._path, self._tell, self._at = folder / FILE, tell, 0

    def __call__(self) -> None:
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._at:
                self._at = 0  # a resumed run has written the file anew
            file.seek(self._at)
            *lines, _ = file.read().split(b"\n")  # the last one is not whole yet
        try:
            for line in lines:
                self._tell(StepMetrics(**json.loads(line)))
            self._at += sum(len(line) + 1 for line in lines)
        except ValueError:
            self._at = 0  # as above, and it has grown beyond the old place since


class LogHook(Hook):
    """Logs every ``log.every``-th step, and the last; stops a run whose loss is no number."""

    def __init__(self) -> None:
        self.writer: MetricsWriter | None = None  # of rank 0, from the first step on
        self._sinks: tuple[Sink, ...] = ()
        self._work = 0.0
        self._peak: float | None = None

    def start(self, run: Run) -> None:
        """Look at the device, and at what else shall be told."""
        config, device = run.config, run.state.meshes.device
        frozen = config.lora.rank > 0
        self._work = flops_per_token(config.model, config.train.seq_len, frozen)
        self._work /= run.state.meshes.world.size()
        cuda = device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if cuda else None
        if run.first:
            self._sinks = sinks(config)

    def step(self, run: Run, metrics: StepMetrics) -> None:
        """Log a step."""
        if run.first and self.writer is None:  # now it is known where the run goes on
            folder = run.config.save.folder
            folder.mkdir(parents=True, exist_ok=True)
            self.writer = MetricsWriter(folder, metrics.step - 1, self._sinks)
        due = metrics.step % run.config.log.every == 0 or metrics.step == run.config.train.steps
        broken = not math.isfinite(metrics.loss)
        if self.writer is not None and (due or broken):
            rate = metrics.tokens_per_s * self._work
            mfu = rate / self._peak if self._peak else None
            memory = _memory(run.state.meshes.device)
            self.writer.write(replace(metrics, tflops=rate / 1e12, mfu=mfu, memory=memory))
        if broken:
            raise TrainError(
                f"step {metrics.step}: the loss is {metrics.loss}; go on from an earlier "
                "checkpoint with a lower optim.lr or a lower train.clip"
            )

    def stop(self, run: Run) -> None:
        """Close the files."""
        if self.writer is not None:
            self.writer.close()

    fail = stop


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
