"""Train and export in one go; each stage goes on where an interrupted one ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...convert.gguf_plan import parse_types
from ...errors import ConfigError
from ...shardio import open_checkpoint
from ...shardio.report import Inspection, inspect_checkpoint
from ..checkpoint import check_files, step_folder
from ..launch import launch
from ..metrics import Follower, StepMetrics, read_metrics
from ..settings.degrees import resolve
from .export import ExportJob, ExportReport, Stage, export
from .proof import Proof

TYPES = ("Q8_0", "Q4_K_M")

#: Is told of finished stages, training steps, the sharded checkpoint and proofs.
Listener = Callable[[Stage | StepMetrics | Inspection | Proof], None]


def run_pipeline(
    run: Path, job: ExportJob, settings: Sequence[str], processes: int, tell: Listener
) -> ExportReport:
    """Train the run of a TOML file, then export what it became.

    Args:
        run: the file; ``job.config`` is what it says, with ``settings``.
        job: the export; ``TYPES`` where it has no types.
        settings: as of ``load_config``.
        processes: ranks of the training.
        tell: the listener.

    Raises:
        MconvError: the configuration, the data or a target cannot be used.
        TrainError: a rank failed.
    """
    config = job.config
    resolve(config, processes)
    check_types(job.types)
    if config.save.resume not in ("auto", "none"):
        raise ConfigError("a pipeline resumes from its own folder: leave save.resume as it is")
    folder = step_folder(config.save.folder, config.train.steps)
    started = time.monotonic()
    if folder.is_dir():
        check_files(folder)
        tell(Stage("train", f"{folder.name} (there already)", 0.0))
        return export_run(job, tell)
    follower = Follower(config.save.folder, tell)
    launch(run, config.save.folder, processes, follower, settings)
    losses = [m.loss for m in read_metrics(config.save.folder)]
    detail = f"{config.train.steps} steps on {processes} processes"
    if losses:
        detail += f", loss {losses[0]:.2f} -> {losses[-1]:.3f}"
    tell(Stage("train", detail, time.monotonic() - started))
    return export_run(job, tell)


def check_types(types: Sequence[str]) -> None:
    """Refuse a misspelt GGUF type before the training, not after it.

    Raises:
        ConfigError: a type that there is not.
    """
    parse_types(",".join(t for t in types if t.lower() != "auto") or TYPES[0], ())


def export_run(job: ExportJob, tell: Listener) -> ExportReport:
    """Export what a finished run became.

    Raises:
        MconvError: the run is not finished, or a target cannot be used.
    """
    folder = step_folder(job.config.save.folder, job.config.train.steps)
    if not folder.is_dir():
        save = job.config.save.folder
        raise ConfigError(f"{save}: training was ended early; start again to go on")
    tell(inspect_checkpoint(open_checkpoint(folder)))
    types = tuple(t.upper() for t in job.types) or TYPES
    return export(replace(job, types=types), tell)
