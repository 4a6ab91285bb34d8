"""``mconv quantize IN.gguf OUT.gguf TYPE[,TYPE2...]``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    human,
    limits,
    output_options,
    progress_bar,
    render_options,
    show_json,
    warn,
)
from .recipe_options import Asked, error_json, recipe_options, show_errors

if TYPE_CHECKING:
    from ..convert.quantize import OutputReport, QuantizeReport


class Layers(click.ParamType):
    """Layer numbers: ``3,5,8``."""

    name = "layers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdigit() for part in parts):
            self.fail(f"{value!r} is not a list of layer numbers such as 3,5,8", param, ctx)
        return tuple(int(part) for part in parts)


@click.command("quantize")
@click.argument("src", metavar="IN", type=click.Path())
@click.argument("out", type=click.Path())
@click.argument("types", metavar="TYPE[,TYPE...]")
@click.option("--allow-requantize", is_flag=True, help="Encode already quantized tensors again.")
@click.option("--prune-layers", type=Layers(), default=(), help="Layers to leave out, 3,5,8.")
@click.option("--keep-split", is_flag=True, help="Split the output like the input.")
@recipe_options
@output_options
@render_options
def command(
    src: str,
    out: str,
    types: str,
    allow_requantize: bool,
    prune_layers: tuple[int, ...],
    keep_split: bool,
    max_memory: int,
    threads: int | None,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Quantize the GGUF model IN to one or several types.

    Several types are made from one read: OUT may contain {type}, be a folder, or gets -TYPE before
    .gguf. A split IN is read whole when any of its files is given.

    \b
    mconv quantize model-bf16.gguf model-Q4_K_M.gguf Q4_K_M
    mconv quantize model-bf16.gguf out/ Q4_K_M,IQ4_XS --imatrix imatrix.gguf
    mconv quantize model-bf16.gguf small.gguf IQ3_M --tensor-type 'attn_v=q6_k' --dry-run
    """
    from ..convert.quantize import quantize_gguf

    started = time.monotonic()
    options = replace(
        Asked.taken(asked, dry_run=dry_run).options(),
        allow_requantize=allow_requantize,
        prune_layers=prune_layers,
        keep_split=keep_split,
    )
    shown = not (quiet or as_json or dry_run)
    with progress_bar(f"quantize {Path(src).name}", shown=shown) as progress:
        report = quantize_gguf(
            src,
            out,
            [name for name in types.split(",") if name.strip()],
            options,
            force=force,
            resume=resume,
            dry_run=dry_run,
            limits=limits(max_memory, threads),
            progress=progress,
        )
    seconds = time.monotonic() - started
    if as_json:
        show_json(_as_json(report, seconds, dry_run))
    elif not quiet:
        warn(report.warnings)
        _show(report, seconds, dry_run)


def _as_json(report: QuantizeReport, seconds: float, dry_run: bool) -> dict[str, Any]:
    return {
        "source": str(report.source),
        "source_bytes": report.source_bytes,
        "source_bpw": round(report.source_bpw, 4),
        "outputs": [
            {
                "target": one.target,
                "files": {str(path): size for path, size in one.files.items()},
                "data_bytes": one.data_bytes,
                "bpw": round(one.bpw, 4),
                "needs_importance": list(one.unmet),
                "tensors": [
                    {
                        "name": t.name,
                        "shape": list(t.shape),
                        "from": t.source_type,
                        "type": t.type.name,
                        "bytes": t.nbytes,
                        "note": t.note,
                        **error_json(t),
                    }
                    for t in one.tensors
                ],
            }
            for one in report.outputs
        ],
        "warnings": list(report.warnings),
        "seconds": round(seconds, 3),
        "dry_run": dry_run,
    }


def _show(report: QuantizeReport, seconds: float, dry_run: bool) -> None:
    if dry_run:
        for one in report.outputs:
            _table(one)
    verb = "would write" if dry_run else "wrote"
    for one in report.outputs:
        paths = list(one.files)
        name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        click.echo(
            f"{verb} {name}: {one.target}, {human(one.data_bytes)}, {one.bpw:.2f} bits per weight "
            f"(was {human(report.source_bytes)}, {report.source_bpw:.2f})"
        )
        show_errors(one.tensors)
    if not dry_run:
        click.echo(f"in {seconds:.1f} s")


def _table(one: OutputReport) -> None:
    """One line per tensor: name, shape, type before and after, bytes."""
    rows: list[Sequence[str]] = [("tensor", "shape", "from", "to", "bytes", "")]
    rows += [
        (
            t.name,
            "x".join(map(str, t.shape)),
            t.source_type,
            t.type.name,
            f"{t.nbytes:,}",
            t.note,
        )
        for t in one.tensors
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    click.echo(f"{one.target}:")
    for name, shape, before, after, nbytes, note in rows:
        line = (
            f"  {name:<{widths[0]}}  {shape:>{widths[1]}}  {before:<{widths[2]}}  "
            f"{after:<{widths[3]}}  {nbytes:>{widths[4]}}  {note}"
        )
        click.echo(line.rstrip())
