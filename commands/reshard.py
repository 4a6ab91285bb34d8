"""``mconv reshard SRC DST``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import counted
from .layout_options import layout_options, make_layout
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

if TYPE_CHECKING:
    from ..convert.reshard import ReshardReport


class _Target(click.Option):
    """``--to``, whose help lists the targets; the writers are imported only for that."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help."""
        from ..shardio.writers import writers

        self.help = f"Target layout: {', '.join(sorted([*writers(), 'gguf']))}."
        return super().get_help_record(ctx)


@click.command("reshard")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option("--to", "target", default="hf", show_default=True, cls=_Target)
@click.option("--dtype", help="Cast the weights: f32, f16, bf16 (default: keep).")
@click.option("--max-shard-size", type=Size(), help="Bytes per output file (default 5GB).")
@layout_options
@click.option(
    "--with-optimizer/--weights-only",
    default=None,
    help="Write the optimizer states (default: where the target is a layout to train on).",
)
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
    with_optimizer: bool | None,
    weights: str,
    vocab_size: int | None,
    tokenizer: str | None,
    verify: bool,
    config: str | None,
    source_format: str | None,
    adapter: str | None,
    max_memory: int,
    threads: int | None,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **axes: Any,
) -> None:
    """Bring the checkpoint SRC of any layout into another one, DST.

    \b
    mconv reshard runs/zero3/global_step1000 merged --to hf --dtype bf16
    mconv reshard megatron/iter_0001000 merged --vocab-size 32000
    mconv reshard runs/zero1 zero3 --to deepspeed --zero-stage 3 --dp 16
    mconv reshard runs/zero3 fsdp --to dcp --dp 8 --tp 2
    """
    from ..convert.reshard import reshard
    from ..shardio import open_checkpoint

    started = time.monotonic()
    ckpt = open_checkpoint(src, format=source_format, config=config, adapter=adapter)
    with progress_bar(f"reshard {Path(src).name}", shown=not (quiet or as_json)) as progress:
        report = reshard(
            ckpt,
            dst,
            make_layout(target, dtype, max_shard_size, axes),
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
    elif not quiet:
        _show(report, seconds, dry_run)


def _show(report: ReshardReport, seconds: float, dry_run: bool) -> None:
    warn(report.warnings)
    verb = "would write" if dry_run else "wrote"
    click.echo(
        f"{verb} {report.target}: {counted(report.tensors, 'tensor')}, "
        f"{counted(report.parameters, 'parameter')}, {counted(len(report.files), 'file')}, "
        f"{human(report.nbytes)} in {seconds:.1f} s"
    )
