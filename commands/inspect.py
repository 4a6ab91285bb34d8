"""``mconv inspect PATH``: what a checkpoint is, its modules, one tensor, a check of every byte."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..errors import FormatError
from .options import progress_bar, render_options, show_json, source_options

if TYPE_CHECKING:
    from ..shardio import Checkpoint


@click.command("inspect")
@click.argument("path", type=click.Path())
@click.option("--tensors/--no-tensors", default=None, help="List every tensor (default: up to 40).")
@click.option("--tree", is_flag=True, help="Show the modules as a tree, equal ones once.")
@click.option("--tensor", "name", help="Show one tensor: its pieces, statistics, a histogram.")
@click.option(
    "--verify",
    is_flag=True,
    help="Read everything: copies, NaN, fp32 masters, checksums.",
)
@source_options
@render_options
def command(
    path: str,
    tensors: bool | None,
    tree: bool,
    name: str | None,
    verify: bool,
    config: str | None,
    source_format: str | None,
    adapter: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what the checkpoint at PATH is. Reads metadata only, unless --verify or --tensor is
    given.

    Exits with 2 when it is broken or incomplete.
    """
    if sum((tree, name is not None, verify)) > 1:
        raise click.UsageError("--tree, --tensor and --verify exclude each other")
    from ..shardio import open_checkpoint

    try:
        ckpt = open_checkpoint(path, format=source_format, config=config, adapter=adapter)
    except FormatError:
        if not (as_json or quiet):
            _say_what_is_there(path)
        raise
    if name is not None:
        _tensor(ckpt, name, as_json, quiet)
    elif tree:
        _tree(ckpt, as_json, quiet)
    elif verify:
        _verify(ckpt, as_json, quiet)
    else:
        _inspect(ckpt, tensors, as_json, quiet)


def _say_what_is_there(path: str) -> None:
    from ..shardio.report import present_files
    from .inspect_text import show_present

    show_present(present_files(path))


def _inspect(ckpt: Checkpoint, tensors: bool | None, as_json: bool, quiet: bool) -> None:
    from ..shardio.report import inspect_checkpoint
    from .inspect_text import show_report

    report = inspect_checkpoint(ckpt)
    if as_json:
        show_json({**asdict(report), "whole": report.whole})
    elif not quiet:
        show_report(report, tensors)
    _refuse(report.problems)


def _tree(ckpt: Checkpoint, as_json: bool, quiet: bool) -> None:
    from ..shardio.module_tree import module_tree
    from ..shardio.report import inspect_checkpoint
    from .inspect_text import show_tree

    report = inspect_checkpoint(ckpt)
    root = module_tree(report.tensors, report.path.name)
    if as_json:
        show_json(asdict(root))
    elif not quiet:
        show_tree(root)
    _refuse(report.problems)


def _tensor(ckpt: Checkpoint, name: str, as_json: bool, quiet: bool) -> None:
    from ..shardio.tensor_detail import tensor_detail
    from .inspect_text import show_tensor

    with progress_bar("reading", shown=not (quiet or as_json)) as progress:
        detail = tensor_detail(ckpt, name, progress=progress)
    if as_json:
        show_json(asdict(detail))
    elif not quiet:
        show_tensor(detail)
    _refuse((f"{detail.name}: {detail.problem}",) if detail.problem else ())


def _verify(ckpt: Checkpoint, as_json: bool, quiet: bool) -> None:
    from ..shardio.full_check import verify_checkpoint
    from .inspect_text import show_verification

    with progress_bar("verifying", shown=not (quiet or as_json)) as progress:
        found = verify_checkpoint(ckpt, progress)
    if as_json:
        data: dict[str, Any] = {"path": ckpt.path, **asdict(found), "sound": found.sound}
        show_json(data)
    elif not quiet:
        show_verification(ckpt.path, found)
    _refuse(tuple(f"{flaw.name}: {flaw.problem}" for flaw in found.problems))


def _refuse(problems: tuple[str, ...]) -> None:
    """Name the first problems on stderr and exit with 2; do nothing without any."""
    if not problems:
        return
    for problem in problems[:10]:
        click.echo(f"{click.style('broken:', fg='red')} {problem}", err=True)
    if len(problems) > 10:
        click.echo(f"and {len(problems) - 10} more; --json lists all", err=True)
    raise click.exceptions.Exit(2)
