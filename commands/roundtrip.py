"""``mconv roundtrip SRC --via LAYOUT...``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import counted
from .options import (
    Size,
    human,
    limits,
    measure_option,
    progress_bar,
    render_options,
    show_json,
    warn,
    workers_option,
)

if TYPE_CHECKING:
    from ..convert.roundtrip import RoundtripReport


@click.command("roundtrip")
@click.argument("src", type=click.Path())
@click.option(
    "--via", multiple=True, required=True, metavar="LAYOUT",
    help="A layout to pass, such as deepspeed:zero=3,dp=4; several in order.",
)  # fmt: skip
@click.option("--weights-only", is_flag=True, help="Leave the optimizer out.")
@click.option("--work", type=click.Path(exists=True, file_okay=False), help="Temporary folder.")
@click.option("--vocab-size", type=click.IntRange(1), help="True vocabulary size, where padded.")
@click.option("--max-memory", type=Size(), default=1 << 30, show_default="1GiB")
@click.option("--threads", type=click.IntRange(1), help="Worker threads (default: cores).")
@workers_option
@measure_option
@click.option("--config", type=click.Path(exists=True), help="config.json, if it has none.")
@click.option("--format", "source_format", help="Format of SRC, if not to be found out.")
@render_options
def command(
    src: str,
    via: tuple[str, ...],
    weights_only: bool,
    work: str | None,
    vocab_size: int | None,
    max_memory: int,
    threads: int | None,
    config: str | None,
    source_format: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prove that a chain of conversions gives the checkpoint SRC back bit for bit.

    \b
    mconv roundtrip runs/step1000 --via deepspeed:zero=3,dp=4 --via dcp:dp=8,tp=2
    """
    from ..convert.roundtrip import roundtrip
    from ..shardio import open_checkpoint

    started = time.monotonic()
    ckpt = open_checkpoint(src, format=source_format, config=config)
    with progress_bar(f"roundtrip {Path(src).name}", shown=not (quiet or as_json)) as progress:
        report = roundtrip(
            ckpt,
            via,
            work=work,
            vocab_size=vocab_size,
            weights_only=weights_only,
            limits=limits(max_memory, threads),
            progress=progress,
        )
    seconds = time.monotonic() - started
    if as_json:
        show_json({**asdict(report), "lossless": report.lossless, "seconds": round(seconds, 3)})
    elif not quiet:
        _render(report, seconds)
    if not report.lossless:
        raise click.exceptions.Exit(1)


def _render(report: RoundtripReport, seconds: float) -> None:
    warn(report.notes)
    for name in report.missing:
        click.echo(f"{name}: did not come back")
    for name in report.extra:
        click.echo(f"{name}: was not there")
    for d in report.changed:
        click.echo(f"{d.name}: {d.different} of {d.size} elements differ, max abs {d.max_abs:.3g}")
    path = " > ".join(report.path)
    if report.lossless:
        click.echo(
            f"lossless: {path}: {counted(report.tensors, 'tensor')} came back bit for bit, "
            f"{human(report.nbytes)} written in {seconds:.1f} s"
        )
    else:
        lost = len(report.missing) + len(report.extra) + len(report.changed)
        click.echo(f"NOT lossless: {path}: {lost} of {report.tensors} tensors are not as they were")
