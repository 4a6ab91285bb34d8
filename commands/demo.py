"""``mconv demo``."""

from __future__ import annotations

import textwrap
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .options import human, render_options, show_json
from .stages import Screen, fail_unless_proven, say

if TYPE_CHECKING:
    from ..trainer.delivery.demo import DemoReport


@click.command("demo")
@click.option(
    "--dir",
    "folder",
    type=click.Path(),
    default="mconv-demo",
    show_default=True,
    help="Folder for everything that is made.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=100, show_default=True, help="Training steps."
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Ranks of the sharded training.",
)
@click.option("--force", is_flag=True, help="Replace an earlier demo.")
@render_options
def command(
    folder: str, steps: int, processes: int, force: bool, as_json: bool, quiet: bool
) -> None:
    """Train a tiny model sharded, merge, export, quantize and prove it, on this machine.

    Needs no network and no GPU. Exits with 1 when a proof fails.
    """
    from ..trainer.delivery.demo import demo

    started = time.monotonic()
    screen = nullcontext(None) if quiet or as_json else Screen(steps)
    with screen as listener:
        report = demo(folder, steps=steps, processes=processes, force=force, listener=listener)
    seconds = time.monotonic() - started
    if as_json:
        show_json({**asdict(report), "ok": report.ok, "seconds": round(seconds, 3)})
    elif not quiet:
        _print(report, seconds)
    fail_unless_proven(report.proofs)


def _print(report: DemoReport, seconds: float) -> None:
    """Print the sample, the files and what to do next."""
    lines = textwrap.wrap(report.text, 88)
    for n, line in enumerate(lines):
        say("" if n else "sample", line)
    sizes = ", ".join(f"{name} {human(size)}" for name, size in report.files.items())
    say("files", f"{report.folder}: {sizes}")
    say("next", f"ollama create lighthouse -f {report.folder}/Modelfile")
    click.echo(f"{'done' if report.ok else 'done, with FAILED proofs'} in {seconds:.1f} s")
