"""What a run tells while it runs: one JSON line per step in ``metrics.jsonl``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step: ``step`` counts from 1, ``loss`` is per token in nats, ``seconds`` of this step."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    seconds: float


class MetricsWriter:
    """Appends metrics to the file of a run; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / FILE).open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Append a line and hand it to the system, so that readers see it at once."""
        self._file.write(json.dumps(asdict(metrics)) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def read_metrics(folder: Path) -> list[StepMetrics]:
    """Return the whole lines that a run has written so far."""
    path = folder / FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [StepMetrics(**json.loads(line)) for line in lines if line.endswith("\n")]
