"""``mconv pipeline``."""

from __future__ import annotations

import textwrap
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ConfigError
from .options import human, render_options, show_json
from .stages import Screen, fail_unless_proven, say

if TYPE_CHECKING:
    from ..trainer.delivery.export import ExportReport


@click.command("pipeline")
@click.argument("run", type=click.Path(exists=True, dir_okay=False))
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Replace a value of the file; may be given several times.")  # fmt: skip
@click.option("--nproc", type=click.IntRange(1), default=1, show_default=True,
              help="Ranks of the training on this machine.")  # fmt: skip
@click.option("--type", "types", help="GGUF types with commas (export.types); default Q8_0,Q4_K_M.")
@click.option("--out", type=click.Path(file_okay=False),
              help="Folder for the exported model; default export in the run's.")  # fmt: skip
@render_options
def command(
    run: str,
    settings: tuple[str, ...],
    nproc: int,
    types: str | None,
    out: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train, merge, export to GGUF, write a Modelfile and prove all of it.

    Every stage goes on where an interrupted one ended: training from its newest checkpoint, export
    with the files that are missing. Exits with 1 when a proof fails.

    \b
    mconv pipeline run.toml --nproc 4 --type Q8_0,Q4_K_M
    """
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ConfigError("training needs torch: pip install 'mconv[train]'")
    from ..trainer.delivery.export import ExportJob
    from ..trainer.delivery.pipeline_run import run_pipeline
    from ..trainer.launch import torchrun_rank
    from ..trainer.settings import load_config

    if torchrun_rank():
        raise ConfigError(
            f"mconv pipeline starts its own ranks: train with torchrun ... mconv train {run}, then "
            "start mconv pipeline without torchrun"
        )

    config = load_config(Path(run), settings)
    wanted = tuple(t.strip() for t in types.split(",")) if types else config.export.types
    job = ExportJob(config=config, types=wanted, folder=Path(out) if out else None)
    started = time.monotonic()
    screen = nullcontext(None) if quiet or as_json else Screen(config.train.steps)
    with screen as listener:
        tell = listener or (lambda _: None)
        report = run_pipeline(Path(run), job, settings, nproc, tell)
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        show_json({**asdict(report), "ok": report.ok, "seconds": seconds})
    elif not quiet:
        _print(report, seconds)
    fail_unless_proven(report.proofs)


def _print(report: ExportReport, seconds: float) -> None:
    for n, text in enumerate(textwrap.wrap(report.text, 84)):
        say("" if n else "sample", text)
    sizes = ", ".join(f"{name} {human(size)}" for name, size in report.files.items())
    say("files", f"{report.folder}: {sizes}")
    say("next", f"ollama create NAME -f {report.folder}/Modelfile")
    click.echo(f"{'done' if report.ok else 'done, with FAILED proofs'} in {seconds:.1f} s")
