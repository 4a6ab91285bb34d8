"""``mconv from-gguf FILE.gguf DIR``."""

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
    output_options,
    progress_bar,
    render_options,
    show_json,
    warn,
)

if TYPE_CHECKING:
    from ..convert.from_gguf import FromGgufReport

_SHOWN = 10


@click.command("from-gguf")
@click.argument("src", metavar="FILE", type=click.Path())
@click.argument("dst", metavar="DIR", type=click.Path())
@click.option("--dtype", help="f32, f16 or bf16 for all weights (default: as stored).")
@click.option(
    "--config",
    type=click.Path(exists=True),
    help="The model's own config.json, instead of one made of the metadata.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True),
    help="Folder of the model's own tokenizer, instead of one made of the metadata.",
)
@click.option("--max-shard-size", type=Size(), help="Bytes per output file (default 5GB).")
@output_options
@render_options
def command(
    src: str,
    dst: str,
    dtype: str | None,
    config: str | None,
    tokenizer: str | None,
    max_shard_size: int | None,
    max_memory: int,
    threads: int | None,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Bring the GGUF model FILE back into a Hugging Face folder DIR.

    Weights, config.json, tokenizer, chat template and generation settings come back, so that
    transformers loads the folder. Quantized tensors are decoded. What a conversion to GGUF would
    not give again is listed.

    \b
    mconv from-gguf model-bf16.gguf model
    mconv from-gguf model-Q4_K_M.gguf model --dtype f32
    mconv from-gguf model-00001-of-00003.gguf model --tokenizer original/
    """
    from ..convert.from_gguf import from_gguf

    started = time.monotonic()
    shown = not (quiet or as_json or dry_run)
    with progress_bar(f"from-gguf {Path(src).name}", shown=shown) as progress:
        report = from_gguf(
            src,
            dst,
            dtype=dtype,
            config=config,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            force=force,
            resume=resume,
            dry_run=dry_run,
            limits=limits(max_memory, threads),
            progress=progress,
        )
    seconds = time.monotonic() - started
    if as_json:
        show_json({**asdict(report), "seconds": round(seconds, 3), "dry_run": dry_run})
    elif not quiet:
        _show(report, seconds, dry_run)


def _show(report: FromGgufReport, seconds: float, dry_run: bool) -> None:
    warn(report.warnings)
    if report.differences:
        count = len(report.differences)
        lines = [f"  {line}" for line in report.differences[:_SHOWN]]
        lines += [f"  ... and {count - _SHOWN} more (--json lists all)"] * (count > _SHOWN)
        click.echo("converted to GGUF again, the file would not be the same:", err=True)
        click.echo("\n".join(lines), err=True)
    verb = "would write" if dry_run else "wrote"
    size = f"{counted(len(report.files), 'file')}, {human(report.nbytes)}"
    click.echo(
        f"{verb} {report.target}: {report.model} in {report.dtype}, "
        f"{counted(report.tensors, 'tensor')}, {counted(report.parameters, 'parameter')}, {size} "
        f"in {seconds:.1f} s"
    )
