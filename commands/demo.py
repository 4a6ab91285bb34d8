"""``mconv demo``."""

from __future__ import annotations

import textwrap
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .options import human, render_options, show_json

if TYPE_CHECKING:
    from ..shardio.report import Inspection
    from ..trainer.demo import DemoReport, Event


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
    from ..trainer.demo import demo

    started = time.monotonic()
    screen = nullcontext(None) if quiet or as_json else _Screen(steps)
    with screen as listener:
        report = demo(folder, steps=steps, processes=processes, force=force, listener=listener)
    seconds = time.monotonic() - started
    if as_json:
        show_json({**asdict(report), "ok": report.ok, "seconds": round(seconds, 3)})
    elif not quiet:
        _print(report, seconds)
    if not report.ok:
        for proof in report.proofs:
            if not proof.ok:
                failed = click.style("failed:", fg="red", bold=True)
                click.echo(f"{failed} {proof.claim}: {proof.detail}", err=True)
        raise click.exceptions.Exit(1)


class _Screen(AbstractContextManager):
    """Prints stages and proofs as they end, and a bar while the model trains."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("train", total=steps, visible=False)

    def __enter__(self) -> _Screen:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        from ..shardio.report import Inspection
        from ..trainer.metrics import StepMetrics
        from ..trainer.proof import Proof

        if isinstance(event, StepMetrics):
            text = f"train  loss {event.loss:.3f}  {event.tokens_per_s:,.0f} tokens/s"
            self._bar.update(self._task, completed=event.step, description=text, visible=True)
        elif isinstance(event, Inspection):
            _line("inspect", _summary(event))
        elif isinstance(event, Proof):
            mark = click.style(
                "proved" if event.ok else "FAILED", fg="green" if event.ok else "red"
            )
            _line("", f"{mark}  {event.claim}: {event.detail}")
        else:
            self._bar.update(self._task, visible=False)
            _line(event.name, event.detail, event.seconds)


def _summary(r: Inspection) -> str:
    layout = " ".join(f"{k}={v}" for k, v in r.layout.items())
    states = ", ".join(r.optimizer)
    return (
        f"{r.format} {layout}: {r.parameters:,} parameters in {len(r.tensors)} tensors over "
        f"{r.files} files, optimizer {states}; {'whole' if r.whole else 'BROKEN'}"
    )


def _line(name: str, text: str, seconds: float | None = None) -> None:
    time_ = "" if seconds is None else click.style(f"  {seconds:.1f} s", dim=True)
    click.echo(f"{click.style(name.rjust(10), bold=True)}  {text}{time_}")


def _print(report: DemoReport, seconds: float) -> None:
    """Print the sample, the files and what to do next."""
    lines = textwrap.wrap(report.text, 88)
    for n, line in enumerate(lines):
        _line("" if n else "sample", line)
    sizes = ", ".join(f"{name} {human(size)}" for name, size in report.files.items())
    _line("files", f"{report.folder}: {sizes}")
    _line("next", f"ollama create lighthouse -f {report.folder}/Modelfile")
    click.echo(f"{'done' if report.ok else 'done, with FAILED proofs'} in {seconds:.1f} s")
