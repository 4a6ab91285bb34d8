"""``mconv reshard SRC DST``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click

from .options import (
    Size,
    human,
    limits,
    model_options,
    output_options,
    progress_bar,
    render_options,
    show_json,
    source_options,
    warn,
)


@click.command("reshard")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option("--to", "target", default="hf", show_default=True, help="Target layout.")
@click.option("--dtype", help="Cast the weights: f32, f16, bf16 (default: keep).")
@click.option("--max-shard-size", type=Size(), help="Bytes per output file (default 5GB).")
@click.option("--with-optimizer", is_flag=True, help="Also write the optimizer states.")
@model_options
@source_options
@output_options
@render_options
def command(
    src: str,
    dst: str,
    target: str,
    dtype: str | None,
    max_shard_size: int | None,
    with_optimizer: bool,
    weights: str,
    vocab_size: int | None,
    tokenizer: str | None,
    verify: bool,
    config: str | None,
    source_format: str | None,
    max_memory: int,
    threads: int | None,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge the checkpoint SRC of any layout into DST.

    \b
    mconv reshard runs/zero3/global_step1000 merged --to hf --dtype bf16
    mconv reshard megatron/iter_0001000 merged --vocab-size 32000
    """
    from ..convert.reshard import reshard
    from ..shardio import Layout, open_checkpoint

    started = time.monotonic()
    ckpt = open_checkpoint(src, format=source_format, config=config)
    with progress_bar(f"reshard {Path(src).name}", shown=not (quiet or as_json)) as progress:
        report = reshard(
            ckpt,
            dst,
            Layout(target, dtype=dtype, max_shard_size=max_shard_size),
            weights=weights,
            with_optimizer=with_optimizer,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            verify=verify,
            force=force,
            resume=resume,
            dry_run=dry_run,
            limits=limits(max_memory, threads),
            progress=progress,
        )
    seconds = time.monotonic() - started
    if as_json:
        show_json({**asdict(report), "seconds": round(seconds, 3), "dry_run": dry_run})
        return
    if not quiet:
        warn(report.warnings)
        verb = "would write" if dry_run else "wrote"
        click.echo(
            f"{verb} {report.target}: {report.tensors} tensors, {report.parameters:,} parameters, "
            f"{len(report.files)} files, {human(report.nbytes)} in {seconds:.1f} s"
        )
