"""What a run tells while it runs.

``metrics.jsonl`` and ``metrics.csv`` have a line per logged step, ``evals.jsonl`` one per
evaluation; TensorBoard and Weights & Biases get the same when asked for. After a resume the lines
of steps that will come again are taken back. A loss that is no number ends the run.
"""

from __future__ import annotations

import csv
import json
import math
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, TrainError
from .hooks import Hook, Run
from .planning.flops import flops_per_token, peak_flops

if TYPE_CHECKING:
    from .config import RunConfig

FILE = "metrics.jsonl"
TABLE = "metrics.csv"
EVALS = "evals.jsonl"

#: Takes the numbers of a step under their names.
Sink = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step.

    Attributes:
        step: counted from 1.
        loss: per learned token, in nats.
        lr: learning rate.
        grad_norm: before clipping.
        tokens_per_s: of all ranks.
        seconds: of this step.
        tflops: work per second and device, in TFLOP/s; None where it was not computed.
        mfu: the same as a part of the device's peak; None where that is not known.
        memory: most bytes in use so far: of the device, or of the process on CPU.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    seconds: float
    tflops: float | None = None
    mfu: float | None = None
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation: the loss per learned token (None without validation data), and a sample."""

    step: int
    loss: float | None = None
    tokens: int = 0
    prompt: str = ""
    sample: str = ""


class MetricsWriter:
    """Writes the metrics of a run; a context manager. Only rank 0 has one.

    Args:
        folder: of the run.
        after: the step it goes on from; what the files say of later steps is dropped.
        sinks: further takers of numbers.
    """

    def __init__(self, folder: Path, after: int = 0, sinks: tuple[Sink, ...] = ()) -> None:
        kept = [m for m in read_metrics(folder) if m.step <= after]
        evals = [e for e in read_evaluations(folder) if e.step <= after]
        self._lines = (folder / FILE).open("w", encoding="utf-8")
        self._table = (folder / TABLE).open("w", encoding="utf-8", newline="")
        self._evals = (folder / EVALS).open("w", encoding="utf-8") if evals else None
        self._folder, self._sinks = folder, sinks
        self._rows = csv.DictWriter(self._table, [f.name for f in fields(StepMetrics)])
        self._rows.writeheader()
        for metrics in kept:
            self._put(metrics)
        for evaluation in evals:
            self._say(evaluation)

    def write(self, metrics: StepMetrics) -> None:
        """Append a line and hand it to the system, so that readers see it at once."""
        self._put(metrics)
        numbers = {k: v for k, v in asdict(metrics).items() if k != "step" and v is not None}
        for sink in self._sinks:
            sink(metrics.step, numbers)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Append an evaluation."""
        self._say(evaluation)
        if evaluation.loss is not None:
            for sink in self._sinks:
                sink(evaluation.step, {"eval_loss": evaluation.loss})

    def _put(self, metrics: StepMetrics) -> None:
        self._lines.write(json.dumps(asdict(metrics)) + "\n")
        self._rows.writerow(asdict(metrics))
        self._lines.flush()
        self._table.flush()

    def _say(self, evaluation: Evaluation) -> None:
        if self._evals is None:
            self._evals = (self._folder / EVALS).open("w", encoding="utf-8")
        self._evals.write(json.dumps(asdict(evaluation), ensure_ascii=False) + "\n")
        self._evals.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in (self._lines, self._table, self._evals):
            if file is not None:
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


class LogHook(Hook):
    """Logs every ``log.every``-th step, and the last; stops a run whose loss is no number.

    Attributes:
        writer: of rank 0, from the first step on; evaluations go there too.
    """

    def __init__(self) -> None:
        self.writer: MetricsWriter | None = None
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
            self.writer.write(self.complete(run, metrics))
        if broken:
            raise TrainError(
                f"step {metrics.step}: the loss is {metrics.loss}; go on from an earlier "
                "checkpoint with a lower optim.lr or a lower train.clip"
            )

    def complete(self, run: Run, metrics: StepMetrics) -> StepMetrics:
        """Add work and memory to the figures of a step."""
        rate = metrics.tokens_per_s * self._work
        return replace(
            metrics,
            tflops=rate / 1e12,
            mfu=rate / self._peak if self._peak else None,
            memory=_memory(run.state.meshes.device),
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


def sinks(config: RunConfig) -> tuple[Sink, ...]:
    """Return the takers that ``log.to`` names.

    Raises:
        ConfigError: one of them is not installed.
    """
    made = {"tensorboard": _tensorboard, "wandb": _wandb}
    return tuple(made[name](config) for name in config.log.to)


def _tensorboard(config: RunConfig) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log.to names tensorboard, which is not installed: pip install tensorboard"
        ) from error
    writer = SummaryWriter(str(config.save.folder / "tensorboard"))

    def put(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return put


def _wandb(config: RunConfig) -> Sink:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "log.to names wandb, which is not installed: pip install wandb"
        ) from error
    settings = json.loads(json.dumps(asdict(config), default=str))
    run = wandb.init(project="mconv", dir=str(config.save.folder), config=settings)

    def put(step: int, numbers: Mapping[str, float]) -> None:
        run.log(dict(numbers), step=step)

    return put
