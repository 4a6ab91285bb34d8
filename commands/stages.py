"""Printing stages and proofs as they end, and a bar while a model trains (demo, pipeline)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import click

from ..errors import counted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..shardio.report import Inspection
    from ..trainer.delivery.export import Stage
    from ..trainer.delivery.proof import Proof
    from ..trainer.metrics import StepMetrics


class Screen(AbstractContextManager["Screen"]):
    """A listener that prints."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, visible=False)

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Stage | StepMetrics | Inspection | Proof) -> None:
        from ..shardio.report import Inspection
        from ..trainer.delivery.proof import Proof
        from ..trainer.metrics import StepMetrics

        if isinstance(event, StepMetrics):
            text = f"train  loss {event.loss:.3f}  {event.tokens_per_s:,.0f} tokens/s"
            self._bar.update(self._task, completed=event.step, description=text, visible=True)
        elif isinstance(event, Inspection):
            say("inspect", _summary(event))
        elif isinstance(event, Proof):
            mark = click.style(
                "proved" if event.ok else "FAILED", fg="green" if event.ok else "red"
            )
            say("", f"{mark}  {event.claim}: {event.detail}")
        else:
            self._bar.update(self._task, visible=False)
            say(event.name, event.detail, event.seconds)


def say(name: str, text: str, seconds: float | None = None) -> None:
    """Print one line: a name, what it is, how long it took."""
    time_ = "" if seconds is None else click.style(f"  {seconds:.1f} s", dim=True)
    click.echo(f"{click.style(name.rjust(16), bold=True)}  {text}{time_}")


def fail_unless_proven(proofs: Iterable[Proof]) -> None:
    """End with status 1 after naming the proofs that failed, if any did."""
    failed = [p for p in proofs if not p.ok]
    for proof in failed:
        mark = click.style("failed:", fg="red", bold=True)
        click.echo(f"{mark} {proof.claim}: {proof.detail}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


def _summary(r: Inspection) -> str:
    layout = " ".join((r.format, *(f"{k}={v}" for k, v in r.layout.items())))
    states = ", ".join(r.optimizer)
    return (
        f"{layout}: {r.parameters:,} parameters in {counted(len(r.tensors), 'tensor')} over "
        f"{counted(r.files, 'file')}, optimizer {states}; {'whole' if r.whole else 'BROKEN'}"
    )
