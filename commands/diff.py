"""``mconv diff A B``: exit code 0 when equal (or within the tolerance), 1 when not."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .options import progress_bar, render_options, show_json

if TYPE_CHECKING:
    from ..convert.diff import DiffReport


@click.command("diff")
@click.argument("left", type=click.Path())
@click.argument("right", type=click.Path())
@click.option("--with-optimizer", is_flag=True, help="Compare the optimizer states too.")
@click.option("--vocab-size", type=click.IntRange(1), help="True vocabulary size of a padded side.")
@click.option(
    "--tolerance", type=float, default=0.0, help="Relative difference that counts as equal."
)
@click.option(
    "--rounded",
    is_flag=True,
    help="Where dtypes differ, compare in the one with fewer bits.",
)
@click.option("--all", "show_all", is_flag=True, help="List equal tensors too.")
@render_options
def command(
    left: str,
    right: str,
    with_optimizer: bool,
    vocab_size: int | None,
    tolerance: float,
    rounded: bool,
    show_all: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare two checkpoints of any formats, streaming. Exits with 1 when they differ."""
    from ..convert.diff import diff

    with progress_bar("diff", shown=not (quiet or as_json)) as progress:
        report = diff(
            left, right, with_optimizer=with_optimizer, vocab_size=vocab_size, rounded=rounded,
            progress=progress,
        )  # fmt: skip
    good = report.within(tolerance) if tolerance else report.equal
    if as_json:
        show_json({**asdict(report), "equal": report.equal, "ok": good})
    elif not quiet:
        _show(report, left, right, show_all)
    if not good:
        raise click.exceptions.Exit(1)


def _show(report: DiffReport, left: str, right: str, show_all: bool) -> None:
    for name in report.only_left:
        click.echo(f"only in {left}: {name}")
    for name in report.only_right:
        click.echo(f"only in {right}: {name}")
    for name, (a, b) in report.reshaped.items():
        click.echo(f"{name}: shape {a} against {b}")
    for d in report.tensors:
        if not d.equal:
            click.echo(
                f"{d.name}: {d.different} of {d.size} elements differ, "
                f"max abs {d.max_abs:.3g}, max rel {d.max_rel:.3g}"
            )
        elif show_all:
            click.echo(f"{d.name}: equal")
    same = sum(d.equal for d in report.tensors)
    click.echo(f"{same} of {len(report.tensors)} common tensors are equal")
    for note in report.notes:
        click.echo(f"note: {note}")
