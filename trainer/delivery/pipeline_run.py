"""Train and export in one go; each stage goes on where an interrupted one ended."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...convert.gguf_plan import parse_types
from ...errors import ConfigError
from ...shardio import open_checkpoint
from ...shardio.report import inspect_checkpoint
from ..checkpoint import check_files, step_folder
from ..config import RunConfig
from ..degrees import resolve
from ..launch import launch
from ..metrics import read_metrics
from .export import ExportJob, ExportReport, Stage, export

TYPES = ("Q8_0", "Q4_K_M")


def run_pipeline(
    run: Path,
    config: RunConfig,
    settings: Sequence[str],
    processes: int,
    types: tuple[str, ...] = (),
    out: Path | None = None,
    listener: Callable[[Any], None] | None = None,
) -> ExportReport:
    """Train the run of a TOML file, then export what it became.

    Args:
        run: the file.
        config: what it says, with ``settings``.
        settings: as of ``load_config``.
        processes: ranks of the training.
        types: GGUF targets; ``TYPES`` without any.
        out: folder for the export; ``export`` in the run's folder without one.
        listener: told of stages, training steps, the checkpoint and proofs.

    Raises:
        MconvError: the configuration, the data or a target cannot be used.
        TrainError: a rank failed.
    """
    tell = listener or (lambda _: None)
    resolve(config, processes)
    check_types(types)
    if config.save.resume not in ("auto", "none"):
        raise ConfigError("a pipeline resumes from its own folder: leave save.resume as it is")
    folder = step_folder(config.save.folder, config.train.steps)
    started = time.monotonic()
    if folder.is_dir():
        check_files(folder)
        tell(Stage("train", f"{folder.name} (there already)", 0.0))
    else:
        _train(run, config, settings, processes, tell)
        losses = [m.loss for m in read_metrics(config.save.folder)]
        detail = f"{config.train.steps} steps on {processes} processes"
        if losses:
            detail += f", loss {losses[0]:.2f} -> {losses[-1]:.3f}"
        tell(Stage("train", detail, time.monotonic() - started))
    return export_run(config, types, out, tell)


def check_types(types: Sequence[str]) -> None:
    """Refuse a misspelt GGUF type before the training, not after it.

    Raises:
        ConfigError: a type that there is not.
    """
    parse_types(",".join(t for t in types if t.lower() != "auto") or TYPES[0], ())


def export_run(
    config: RunConfig, types: tuple[str, ...], out: Path | None, tell: Callable[[Any], None]
) -> ExportReport:
    """Export what a finished run became; arguments as for ``run_pipeline``.

    Raises:
        MconvError: the run is not finished, or a target cannot be used.
    """
    folder = step_folder(config.save.folder, config.train.steps)
    if not folder.is_dir():
        raise ConfigError(f"{config.save.folder}: training was ended early; start again to go on")
    tell(inspect_checkpoint(open_checkpoint(folder)))
    job = ExportJob(
        checkpoint=folder,
        folder=out or config.save.folder / "export",
        config=config,
        types=tuple(t.upper() for t in types) or TYPES,
        name=_name(config.save.folder),
        prompt=config.eval.prompt,
        sample_tokens=config.eval.sample_tokens,
    )
    return export(job, tell)


def _train(
    run: Path,
    config: RunConfig,
    settings: Sequence[str],
    processes: int,
    tell: Callable[[Any], None],
) -> None:
    told = 0

    def follow() -> None:
        nonlocal told
        for metrics in read_metrics(config.save.folder)[told:]:
            tell(metrics)
            told += 1

    launch(run, config.save.folder, processes, follow, settings)


def _name(folder: Path) -> str:
    """Return a file name for the model, after its run's folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-.") or "model"
