"""``mconv gguf show|set|merge|split|hash|repair``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from ..convert.gguf_tools import ToolReport

_FILE = click.argument("file", type=click.Path())
_OUT = click.argument("out", type=click.Path())


@click.group("gguf")
def command() -> None:
    """Show, edit, merge, split and hash GGUF files. Tensor data are never decoded."""


@command.command("show")
@_FILE
@click.option("--key", "keys", multiple=True, help="Show this key whole; repeatable.")
@click.option("--no-tensors", is_flag=True, help="Leave the tensors out.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def show(file: str, keys: tuple[str, ...], no_tensors: bool, as_json: bool) -> None:
    """Show metadata and tensors of FILE (of all files, when it is split)."""
    from ..convert.gguf import open_gguf
    from ..convert.gguf.settings import plain, shown
    from ..errors import ConfigError, did_you_mean

    opened = open_gguf(file)
    for key in keys:
        if key not in opened:
            raise ConfigError(f"{file}: has no key {key!r}{did_you_mean(key, opened.entries)}")
    entries = {k: e for k, e in opened.entries.items() if not keys or k in keys}
    tensors = [] if no_tensors or keys else list(opened.tensors.values())
    if as_json:
        rows = [
            {
                "name": t.name, "type": t.type.name, "shape": t.shape, "bytes": t.nbytes,
                "file": t.path.name, "offset": t.offset,
            }
            for t in tensors
        ]  # fmt: skip
        metadata = {k: {"type": _type(e), "value": plain(e)} for k, e in entries.items()}
        head = {"files": [str(p) for p in opened.paths], "version": opened.version}
        show_json({**head, "big_endian": opened.big_endian, "metadata": metadata, "tensors": rows})
        return
    if keys:
        for entry in entries.values():
            click.echo(entry.value if isinstance(entry.value, str) else plain(entry))
        return
    size = sum(p.stat().st_size for p in opened.paths)
    order = ", big-endian" if opened.big_endian else ""
    click.echo(
        f"{opened.paths[0]}: GGUF {opened.version}{order}, {counted(len(opened.paths), 'file')}, "
        f"{human(size)}, {counted(len(opened.entries), 'key')}, "
        f"{counted(len(opened.tensors), 'tensor')}"
    )
    width = max((len(k) for k in entries), default=0)
    for key, entry in entries.items():
        click.echo(f"  {key:<{width}}  {_type(entry):<9}  {shown(entry)}")
    width = max((len(t.name) for t in tensors), default=0)
    for t in tensors:
        shape = "x".join(map(str, t.shape))
        click.echo(f"  {t.name:<{width}}  {t.type.name:<8}  {shape:>18}  {t.nbytes:>13,}")


def _type(entry: Any) -> str:
    return f"{entry.items.name.lower()}[]" if entry.items is not None else entry.type.name.lower()


@command.command("set")
@_FILE
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--delete", multiple=True, metavar="KEY", help="Take a key out; repeatable.")
@click.option("--out", type=click.Path(), help="Write another file, leave FILE as it is.")
@output_options
@render_options
def set_(
    file: str,
    settings: tuple[str, ...],
    delete: tuple[str, ...],
    out: str | None,
    max_memory: int,
    threads: int | None,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Set metadata of FILE: in place when the header keeps its length, else by a new file that
    replaces it when it is complete.

    A value takes the type of its key; KEY=u32:5 or KEY=f32[]:1,2 name another, KEY=@FILE takes the
    text of a file. An interrupted edit in place is undone with `mconv gguf repair`.

    \b
    mconv gguf set model.gguf general.name="My model" tokenizer.ggml.add_bos_token=false
    mconv gguf set model.gguf tokenizer.chat_template=@template.jinja --out fixed.gguf
    """
    from ..convert.gguf_tools import set_metadata

    with progress_bar(f"set {Path(file).name}", shown=not (quiet or as_json or dry_run)) as bar:
        report = set_metadata(
            file, settings, delete=delete, out=out, force=force, resume=resume, dry_run=dry_run,
            limits=limits(max_memory, threads), progress=bar,
        )  # fmt: skip
    if as_json or quiet:
        _finish(report, dry_run, as_json, quiet)
        return
    warn(report.warnings)
    for key, old, new in report.changes:
        click.echo(f"  {key}: {_value(old)} -> {_value(new)}")
    if not report.changes:
        click.echo("nothing changes")
        return
    how = "in place" if report.in_place else "a new file"
    verb = "would change" if dry_run else "changed"
    click.echo(f"{verb} {', '.join(map(str, report.files))} ({how})")


def _value(entry: Any) -> str:
    from ..convert.gguf.settings import shown

    return "(none)" if entry is None else shown(entry)


@command.command("merge")
@_FILE
@_OUT
@output_options
@render_options
def merge_(
    file: str,
    out: str,
    max_memory: int,
    threads: int | None,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge the split model FILE (any of its files) into OUT."""
    from ..convert.gguf_tools import merge

    with progress_bar(f"merge {Path(file).name}", shown=not (quiet or as_json or dry_run)) as bar:
        report = merge(
            file, out, force=force, resume=resume, dry_run=dry_run,
            limits=limits(max_memory, threads), progress=bar,
        )  # fmt: skip
    _finish(report, dry_run, as_json, quiet)


@command.command("split")
@_FILE
@_OUT
@click.option("--max-shard-size", type=Size(), help="Bytes of tensor data per file.")
@click.option("--max-shard-tensors", type=click.IntRange(1), help="Tensors per file.")
@click.option("--no-tensor-first-split", is_flag=True, help="Metadata alone in the first file.")
@output_options
@render_options
def split_(
    file: str,
    out: str,
    max_shard_size: int | None,
    max_shard_tensors: int | None,
    no_tensor_first_split: bool,
    max_memory: int,
    threads: int | None,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Split FILE into files OUT-00001-of-0000N.gguf."""
    from ..convert.gguf_tools import split

    with progress_bar(f"split {Path(file).name}", shown=not (quiet or as_json or dry_run)) as bar:
        report = split(
            file, out, max_size=max_shard_size, max_tensors=max_shard_tensors,
            empty_first=no_tensor_first_split, force=force, resume=resume, dry_run=dry_run,
            limits=limits(max_memory, threads), progress=bar,
        )  # fmt: skip
    _finish(report, dry_run, as_json, quiet)


@command.command("hash")
@_FILE
@click.option(
    "--algorithm",
    "algorithms",
    multiple=True,
    type=click.Choice(["sha256", "sha1", "uuid"]),
    help="Repeatable (default: sha256).",
)
@click.option("--no-layer", is_flag=True, help="The model's hash only, not the tensors'.")
@click.option(
    "--check",
    type=click.Path(exists=True, dir_okay=False),
    help="Compare with a list that this command printed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def hash_(
    file: str, algorithms: tuple[str, ...], no_layer: bool, check: str | None, as_json: bool
) -> None:
    """Hash the tensor data of FILE: each tensor's, and all together.

    Metadata do not count, so that models which differ only in them have the same hash.
    """
    from ..convert.gguf_tools import check_manifest, hashes

    if check is not None:
        wrong, extra = check_manifest(file, check)
        if as_json:
            show_json({"file": file, "wrong": wrong, "not_listed": extra})
        else:
            for line in wrong:
                click.echo(line)
            click.echo(f"{file}: {'does not match' if wrong else 'matches'} {check}")
        if wrong:
            raise SystemExit(1)
        return
    found = hashes(file, algorithms or ("sha256",), per_tensor=not no_layer)
    if as_json:
        rows = [{"algorithm": a, "digest": d, "tensor": n or None} for a, d, n in found]
        show_json({"file": file, "hashes": rows})
        return
    for algorithm, digest, name in found:
        click.echo(f"{algorithm:<8}  {digest}  {file}{':' if name else ''}{name}")


@command.command("repair")
@_FILE
def repair_(file: str) -> None:
    """Finish or undo an edit of FILE in place that was interrupted."""
    from ..convert.gguf_tools import repair_file

    click.echo(f"{file}: {repair_file(file) or 'nothing to repair'}")


def _finish(report: ToolReport, dry_run: bool, as_json: bool, quiet: bool) -> None:
    if as_json:
        files = {str(path): size for path, size in report.files.items()}
        changed = [key for key, _, _ in report.changes]
        about = {"in_place": report.in_place, "warnings": report.warnings, "dry_run": dry_run}
        show_json({"files": files, "changed": changed, **about})
    elif not quiet:
        names = list(report.files)
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        verb = "would write" if dry_run else "wrote"
        click.echo(f"{verb} {names[0]}{rest}, {human(sum(report.files.values()))}")
