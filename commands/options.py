"""Options and rendering that several commands share: sizes, memory limits, progress, JSON."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from ..shardio.stream import DEFAULT_MEMORY, Limits, Progress
from ..shardio.team import torch_team

F = TypeVar("F", bound=Callable[..., Any])

_WORKERS = "mconv.workers"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?$", re.IGNORECASE)


class Size(click.ParamType):
    """A byte size: ``5GB`` (decimal), ``1GiB`` (binary), ``4096``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.match(str(value).strip())
        if not match:
            self.fail(f"{value!r} is not a size such as 5GB or 1GiB", param, ctx)
        number, unit, binary = match.groups()
        power = "KMGT".index(unit.upper()) + 1 if unit else 0
        factor = 1024**power if binary else _UNITS[unit.upper()]
        size = int(float(number) * factor)
        if size <= 0:
            self.fail("a size must be positive", param, ctx)
        return size


def source_options(fn: F) -> F:
    """Options about opening the source: ``source_format``, ``config`` and ``adapter``."""
    fn = click.option(
        "--adapter", type=click.Path(exists=True), help="PEFT adapter folder to be merged in."
    )(fn)
    fn = click.option(
        "--config",
        type=click.Path(exists=True),
        help="config.json or model folder, if it has none.",
    )(fn)
    return click.option("--format", "source_format", help="Format of SRC, if not to be found out.")(
        fn
    )


def model_options(fn: F) -> F:
    """Options about which weights become the model."""
    for option in (
        click.option(
            "--weights",
            type=click.Choice(["model", "master"]),
            default="model",
            show_default=True,
            help="The model's weights, or the optimizer's fp32 copies.",
        ),
        click.option(
            "--vocab-size",
            type=click.IntRange(1),
            help="True vocabulary size, where the checkpoint is padded.",
        ),
        click.option("--tokenizer", type=click.Path(exists=True), help="Tokenizer folder or file."),
        click.option(
            "--verify-replicas/--no-verify-replicas",
            "verify",
            default=True,
            callback=lambda ctx, param, value: value and _is_first(),  # once is enough
            help="Compare stored copies of a tensor before writing.",
        ),
    ):
        fn = option(fn)
    return fn


def _keep_workers(ctx: click.Context, param: click.Parameter, value: int | None) -> None:
    ctx.meta[_WORKERS] = value


def workers_option(fn: F) -> F:
    """How many processes write."""
    return click.option(
        "--workers",
        type=click.IntRange(1),
        expose_value=False,
        is_eager=True,
        callback=_keep_workers,
        help="Processes to write with (default: one; those of torchrun under torchrun).",
    )(fn)


def _measure(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Tell at the end what the command took, on stderr."""
    if not value:
        return
    from ..shardio.usage import Meter

    meter = Meter()

    def tell() -> None:
        used = meter.usage()
        moved = ""
        if used.read_bytes is not None and used.written_bytes is not None:
            moved = f", {human(used.read_bytes)} read, {human(used.written_bytes)} written"
        peak = f"peak memory {human(max(used.peaks))}"
        if len(used.peaks) > 1:
            peak += (
                f" in the largest of {len(used.peaks)} processes, {human(sum(used.peaks))} in all"
            )
        rank = f"rank {os.environ.get('RANK')}: " if _under_torchrun() else ""
        click.echo(
            f"{rank}{used.seconds:.2f} s, {used.cpu_seconds:.2f} s of CPU time{moved}, {peak}",
            err=True,
        )

    ctx.call_on_close(tell)


def measure_option(fn: F) -> F:
    """Whether to tell what the command took."""
    return click.option(
        "--measure",
        "measure_usage",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_measure,
        help="Tell time, CPU time, bytes and peak memory, of all worker processes together.",
    )(fn)


def output_options(fn: F) -> F:
    """Options about writing."""
    fn = measure_option(workers_option(fn))
    for option in (
        click.option(
            "--max-memory",
            type=Size(),
            default=DEFAULT_MEMORY,
            show_default="1GiB",
            help="Working memory over all threads.",
        ),
        click.option("--threads", type=click.IntRange(1), help="Worker threads (default: cores)."),
        click.option("--force", is_flag=True, help="Replace an existing output."),
        click.option("--resume", is_flag=True, help="Continue an interrupted run."),
        click.option("--dry-run", is_flag=True, help="Plan and check everything, write nothing."),
    ):
        fn = option(fn)
    return fn


def render_options(fn: F) -> F:
    """Options about what is shown."""
    fn = click.option(
        "--json",
        "as_json",
        is_flag=True,
        callback=lambda ctx, param, value: value and _is_first(),
        help="Print the result as JSON.",
    )(fn)
    return click.option(
        "-q",
        "--quiet",
        is_flag=True,
        callback=lambda ctx, param, value: value or not _is_first(),
        help="Print errors only.",
    )(fn)


def limits(max_memory: int, threads: int | None) -> Limits:
    """The limits a user asked for, and the processes: forked here, or those of torchrun."""
    workers = click.get_current_context().meta.get(_WORKERS)
    if workers is None and _under_torchrun():
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = max(1, Limits().workers() // beside)
        return Limits(max_memory, threads or share, team=torch_team())
    return Limits(max_memory, threads, processes=workers or 1)


def _under_torchrun() -> bool:
    """Whether torchrun started this process, with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_first() -> bool:
    """Whether this process speaks for all: only one of torchrun's prints and verifies."""
    alone = click.get_current_context().meta.get(_WORKERS) is not None or not _under_torchrun()
    return alone or os.environ.get("RANK") == "0"


@contextmanager
def progress_bar(label: str, *, shown: bool) -> Iterator[Progress | None]:
    """Show bytes done, rate and time left while the block runs, when stderr is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def show_json(value: Any) -> None:
    """Print a JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def human(nbytes: float) -> str:
    """A byte count for people: ``1.23 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def warn(messages: tuple[str, ...]) -> None:
    """Print warnings on stderr."""
    for message in messages:
        click.echo(f"{click.style('warning:', fg='yellow')} {message}", err=True)
