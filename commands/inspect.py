"""``mconv inspect PATH``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .options import human, render_options, show_json, source_options, warn

if TYPE_CHECKING:
    from ..shardio.report import Inspection


@click.command("inspect")
@click.argument("path", type=click.Path())
@click.option("--tensors/--no-tensors", default=None, help="List every tensor (default: up to 40).")
@source_options
@render_options
def command(
    path: str,
    tensors: bool | None,
    config: str | None,
    source_format: str | None,
    adapter: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what the checkpoint at PATH is. Reads metadata only.

    Exits with 2 when it is broken or incomplete.
    """
    from ..shardio import open_checkpoint
    from ..shardio.report import inspect_checkpoint

    report = inspect_checkpoint(
        open_checkpoint(path, format=source_format, config=config, adapter=adapter)
    )
    if as_json:
        show_json({**asdict(report), "whole": report.whole})
    elif not quiet:
        _print(report, tensors)
    if not report.whole:
        for problem in report.problems[:10]:
            click.echo(f"{click.style('broken:', fg='red')} {problem}", err=True)
        raise click.exceptions.Exit(2)


def _print(r: Inspection, tensors: bool | None) -> None:
    rows = [
        ("path", str(r.path)),
        ("format", r.format + (f" {r.version}" if r.version else "")),
        ("layout", " ".join(f"{k}={v}" for k, v in r.layout.items()) or "one rank"),
        ("step", "unknown" if r.step is None else str(r.step)),
        (
            "parameters",
            f"{r.parameters:,} in {len(r.tensors)} tensors, {human(r.nbytes)}, {r.files} files",
        ),
        ("dtypes", ", ".join(f"{k} {v:,}" for k, v in r.dtypes.items())),
        ("optimizer", ", ".join(f"{k} ({v})" for k, v in r.optimizer.items()) or "none"),
        ("names", r.naming),
    ]
    if r.config:
        rows.append(("config", ", ".join(f"{k}={v}" for k, v in r.config.items())))
    if r.assets:
        rows.append(("files", ", ".join(r.assets)))
    if r.tied:
        rows.append(("tied", ", ".join(f"{a} = {b}" for a, b in r.tied.items())))
    if r.frozen:
        rows.append(("frozen", f"{len(r.frozen)} weights have no optimizer state"))
    rows.append(
        ("coverage", "whole: every element is in exactly one place" if r.whole else "BROKEN")
    )
    for key, value in rows:
        click.echo(f"{click.style(key.rjust(10), bold=True)}  {value}")
    if tensors or (tensors is None and len(r.tensors) <= 40):
        width = max((len(t.name) for t in r.tensors), default=0)
        for t in r.tensors:
            click.echo(
                f"  {t.name:{width}}  {t.dtype:9} {list(t.shape)!s:18} {t.placement}".rstrip()
            )
    elif tensors is None:
        click.echo(f"{'':10}  {len(r.tensors)} tensors; --tensors lists them")
    warn(r.warnings)
    if r.whole:
        click.echo(
            f"convert it: mconv reshard {r.path} OUT --to hf | mconv to-gguf {r.path} OUT.gguf"
        )
