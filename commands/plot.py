"""``mconv plot RUN...``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import render_options, show_json


@click.command("plot")
@click.argument("runs", type=click.Path(exists=True), nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    help="File to draw, .svg or .png (default: curves.svg in the first run's folder).",
)
@render_options
def command(runs: tuple[str, ...], out: str | None, as_json: bool, quiet: bool) -> None:
    """Draw loss, throughput, learning rate and gradient norm of training runs.

    \b
    mconv plot runs/a
    mconv plot runs/a runs/b -o compared.png
    """
    from ..trainer.measure.plot import plot
    from ..trainer.metrics import FILE, read_metrics

    folders = [Path(run) for run in runs]
    first = folders[0].parent if folders[0].name == FILE else folders[0]
    target = plot(folders, Path(out) if out else first / "curves.svg")
    if as_json:
        steps = {str(f): len(read_metrics(f.parent if f.name == FILE else f)) for f in folders}
        show_json({"file": target, "runs": steps})
    elif not quiet:
        click.echo(f"wrote {target}")
