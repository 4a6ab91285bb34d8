"""``mconv train``."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ConfigError
from .options import human, render_options, show_json
from .stages import Screen, fail_unless_proven

if TYPE_CHECKING:
    from ..trainer.planning.dryrun import RunPlan
    from ..trainer.settings import RunConfig


@click.command("train")
@click.argument("run", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Replace a value of the file; may be given several times.",
)
@click.option(
    "--nproc",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Ranks on this machine; under torchrun it says how many.",
)
@click.option("--resume", help="auto, none, or the path of a checkpoint (save.resume).")
@click.option("--init-from", help="Start from a checkpoint of any format (model.init_from).")
@click.option("--dry-run", is_flag=True, help="Show layout, memory and checkpoint size only.")
@render_options
def command(
    run: str,
    settings: tuple[str, ...],
    nproc: int,
    resume: str | None,
    init_from: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train the run of a TOML file, on this machine or as a rank of torchrun.

    With export.types in the file the model is exported when it is trained, as mconv pipeline does.

    \b
    mconv train run.toml --nproc 4
    mconv train run.toml --set optim.lr=3e-4 --set parallel.tp=2 --nproc 4
    torchrun --nproc-per-node 8 --no-python mconv train run.toml
    """
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ConfigError("training needs torch: pip install 'mconv[train]'")
    from ..shardio.team import leave
    from ..trainer.delivery.pipeline_run import check_types
    from ..trainer.launch import launch, run_rank, torchrun_rank
    from ..trainer.metrics import Follower
    from ..trainer.settings import load_config
    from ..trainer.settings.degrees import resolve

    paths = {"save.resume": resume, "model.init_from": init_from}
    said = [*settings, *(f"{k}={_absolute(v)}" for k, v in paths.items() if v is not None)]
    config = load_config(Path(run), said)
    check_types(config.export.types)
    place = torchrun_rank()
    if dry_run:
        _show_plan(config, place[1] if place else nproc, as_json)
    elif place:
        run_rank(config, *place)
        if config.export.types and place[0] == 0:
            click.echo(f"to export the model: mconv pipeline {run}")
        leave(0)
    else:
        resolve(config, nproc)
        if not quiet and not as_json:
            _show_start(config)
        started = time.monotonic()
        screen = nullcontext(None) if quiet or as_json else Screen(config.train.steps)
        with screen as shown:
            poll = Follower(config.save.folder, shown) if shown else None
            launch(Path(run), config.save.folder, nproc, poll, said)
        _show_end(config, time.monotonic() - started, as_json, quiet)
        if config.export.types:
            _export(config, quiet or as_json)


def _absolute(text: str) -> str:
    """Paths of options start where the user is, not where the TOML file lies."""
    return text if text in ("auto", "none") else str(Path(text).resolve())


def _show_start(config: RunConfig) -> None:
    """Say where a run that was begun before goes on."""
    from ..trainer.checkpoint import newest

    wish = config.save.resume
    source = newest(config.save.folder)[0] if wish == "auto" else Path(wish)
    if wish != "none" and source is not None:
        click.echo(f"goes on from {source} (--resume none starts anew)")


def _show_end(config: RunConfig, seconds: float, as_json: bool, quiet: bool) -> None:
    from ..trainer.metrics import read_metrics

    metrics = read_metrics(config.save.folder)
    last = asdict(metrics[-1]) if metrics else {}
    if as_json:
        show_json({"folder": config.save.folder, "seconds": round(seconds, 3), "last": last})
    elif not quiet and last:
        click.echo(
            f"step {last['step']} of {config.train.steps}, loss {last['loss']:.4f}, "
            f"{seconds:.1f} s: {config.save.folder}"
        )


def _export(config: RunConfig, silent: bool) -> None:
    """Make what ``[export]`` asks for, unless the run was ended before its last step."""
    from ..trainer.checkpoint import step_folder
    from ..trainer.delivery.export import ExportJob
    from ..trainer.delivery.pipeline_run import export_run

    if not step_folder(config.save.folder, config.train.steps).is_dir():
        return
    with nullcontext(None) if silent else Screen(config.train.steps) as listener:
        job = ExportJob(config=config, types=config.export.types)
        report = export_run(job, listener or (lambda _: None))
    fail_unless_proven(report.proofs)


def _show_plan(config: RunConfig, world_size: int, as_json: bool) -> None:
    from ..trainer.planning.dryrun import plan_run

    plan = plan_run(config, world_size)
    if as_json:
        show_json({**asdict(plan), "world_size": world_size})
        return
    _line("layout", f"{plan.degrees} on {world_size} processes")
    _line("model", f"{plan.parameters:,} parameters, {config.train.dtype}")
    _line("step", _step_text(config, plan))
    for number, rank in enumerate(plan.ranks):
        name = f"pipeline rank {number}" if len(plan.ranks) > 1 else "each rank"
        stages = " and ".join(_layers(layers) for layers in rank.layers)
        _line(name, f"layers {stages}: {rank.parameters:,} parameters")
        _line(
            "",
            f"{human(rank.parameter_bytes)} parameters + {human(rank.gradient_bytes)} gradients + "
            f"{human(rank.optimizer_bytes)} optimizer + {human(rank.gathered_bytes)} gathered = "
            f"{human(rank.total_bytes)}, and activations",
        )
    _line("checkpoint", f"{human(plan.checkpoint_bytes)} with optimizer")


def _step_text(config: RunConfig, plan: RunPlan) -> str:
    d = plan.degrees
    return (
        f"{plan.tokens_per_step:,} tokens: {config.train.batch} sequences of "
        f"{config.train.seq_len}, {d.rows} per data parallel rank in {d.micro_batches} batches"
    )


def _layers(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _line(name: str, text: str) -> None:
    click.echo(f"{click.style(name.rjust(15), bold=True)}  {text}")
