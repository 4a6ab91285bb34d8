"""What ``mconv inspect`` shows to people: the report, the tree, one tensor, a full check."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import counted
from .options import human, warn

if TYPE_CHECKING:
    from ..shardio.full_check import Verification
    from ..shardio.module_tree import Module
    from ..shardio.report import FileLine, Inspection
    from ..shardio.tensor_detail import TensorDetail
    from ..shardio.tensor_stats import Histogram

_SHOWN = 40
_PIECES = 20
_BAR = 44


def _rows(rows: Iterable[tuple[str, str]]) -> None:
    for key, value in rows:
        click.echo(f"{click.style(key.rjust(10), bold=True)}  {value}")


def show_report(r: Inspection, tensors: bool | None) -> None:
    """Print the report; the tensors if asked for, or if there are few."""
    from ..shardio.report import MODEL_FOLDER

    _rows(_report_rows(r))
    if tensors or (tensors is None and len(r.tensors) <= _SHOWN):
        width = max((len(t.name) for t in r.tensors), default=0)
        for t in r.tensors:
            click.echo(
                f"  {t.name:{width}}  {t.dtype:9} {list(t.shape)!s:18} "
                f"{t.placement or (t.file if r.files > 1 else '')}".rstrip()
            )
    elif tensors is None:
        click.echo(f"{'':10}  {len(r.tensors)} tensors; --tensors lists them, --tree sums them up")
    warn(r.warnings)
    if r.whole:
        for command in r.commands:
            click.echo(f"convert it: {command}")
        if any(MODEL_FOLDER in command for command in r.commands):
            click.echo(f"{MODEL_FOLDER}: the folder of its config.json and tokenizer")


def _report_rows(r: Inspection) -> Iterator[tuple[str, str]]:
    yield "path", str(r.path)
    yield "format", r.format + (f" {r.version}" if r.version else "")
    yield "layout", " ".join(f"{k}={v}" for k, v in r.layout.items()) or "one rank"
    yield "step", "unknown" if r.step is None else str(r.step)
    count = f"{r.parameters:,} in {counted(len(r.tensors), 'tensor')}"
    yield "parameters", f"{count}, {human(r.nbytes)}, {counted(r.files, 'file')}"
    yield "dtypes", ", ".join(f"{k} {v:,}" for k, v in r.dtypes.items())
    states = ", ".join(f"{k} ({v})" for k, v in r.optimizer.items())
    yield "optimizer", f"{r.optimizer_kind}: {states}" if r.optimizer_kind else "none"
    yield "names", r.naming
    if r.config:
        yield "config", ", ".join(f"{k}={v}" for k, v in r.config.items())
    if r.assets:
        yield "beside", ", ".join(r.assets)
    yield from zip(chain(["files"], repeat("")), _file_lines(r.rank_files), strict=False)
    if r.tied:
        yield "tied", ", ".join(f"{a} = {b}" for a, b in r.tied.items())
    for name, (rows, size) in r.padded.items():
        true = f"{size} are real" if size else "how many are real is not saved; give --vocab-size"
        yield "padded", f"{name} has {rows} rows, {true}"
    if r.frozen:
        shown = ", ".join(r.frozen[:4]) + (", ..." if len(r.frozen) > 4 else "")
        yield "frozen", f"{counted(len(r.frozen), 'weight')} without optimizer state: {shown}"
    if r.replicas:
        yield "copies", f"{r.replicas} that must equal the tensor in use; --verify compares them"
    proof = "whole, every element is in exactly one place" if r.whole else "BROKEN"
    yield "coverage", f"{_percent(r.coverage, r.whole)}: {proof}"


def _percent(part: float, whole: bool) -> str:
    return "100 %" if whole else f"{min(part * 100, 99.99):.2f} %"


def _file_lines(files: tuple[FileLine, ...]) -> Iterator[str]:
    """Files whose names differ in numbers only are one line: how many, which numbers, bytes."""
    groups: dict[str, list[FileLine]] = {}
    for file in files:
        groups.setdefault(re.sub(r"\d+", "*", file.name), []).append(file)
    for at, members in enumerate(groups.values()):
        if at == _SHOWN - 1:
            yield f"... {len(groups) - at} more kinds; --json lists all files"
            return
        nbytes = human(sum(f.nbytes for f in members))
        what = _contents(members)
        if len(members) == 1:
            yield f"{members[0].name}  {nbytes}, {what}"
        else:
            name, ranges = _numbers([f.name for f in members])
            yield f"{name}  {counted(len(members), 'file')} ({ranges}), {nbytes}, {what}"


def _contents(members: Iterable[FileLine]) -> str:
    weights, states = (sum(v) for v in zip(*((f.weights, f.states) for f in members), strict=True))
    parts = [
        f"{counted(n, 'piece')} of {what}"
        for n, what in ((weights, "weights"), (states, "states"))
        if n
    ]
    return " and ".join(parts)


def _numbers(names: list[str]) -> tuple[str, str]:
    """Return the common name with ``*`` for each number in which they differ, and ``0..3`` for
    each of these, in their order.
    """
    parts = re.split(r"(\d+)", names[0])
    columns = zip(*(map(int, re.findall(r"\d+", n)) for n in names), strict=False)
    ranges = []
    for k, column in enumerate(columns):
        found = sorted(set(column))
        if len(found) > 1:
            parts[2 * k + 1] = "*"
            whole = found[-1] - found[0] + 1 == len(found)
            ends = f"{found[0]}..{found[-1]}"
            ranges.append(ends if whole else ",".join(map(str, found[:12])))
    return "".join(parts), " x ".join(ranges)


def show_present(present: Mapping[str, tuple[int, int]]) -> None:
    """Print which files lie where no checkpoint could be opened: on stderr, beside the error."""
    for pattern, (count, nbytes) in list(present.items())[:_SHOWN]:
        times = counted(count, "file")
        click.echo(
            f"{click.style('found:', bold=True)} {pattern}  {times}, {human(nbytes)}", err=True
        )


def show_tree(root: Module) -> None:
    """Print the module tree; equal neighbours are one line."""

    def line(module: Module, lead: str, below: str) -> None:
        name, times = module.name, f" x {module.count}" if module.count > 1 else ""
        while len(module.children) == 1 and module.tensor is None and module is not root:
            (module,) = module.children  # a chain is one line
            name += f".{module.name}"
            times += f" x {module.count}" if module.count > 1 else ""
        t = module.tensor
        if t is not None and not module.children:
            about = f"{list(t.shape)} {t.dtype}"
        else:
            about = f"{counted(module.parameters, 'parameter')}, {human(module.nbytes)}"
        click.echo(f"{lead}{click.style(name or '(root)', bold=True)}{times}  {about}")
        for k, child in enumerate(module.children):
            last = k == len(module.children) - 1
            line(child, f"{below}{'└─ ' if last else '├─ '}", f"{below}{'   ' if last else '│  '}")

    line(root, "", "")


def show_tensor(d: TensorDetail) -> None:
    """Print one tensor."""
    rows = [
        ("tensor", d.name + (f" (asked for as {d.alias}, tied to it)" if d.alias else "")),
        ("shape", f"{list(d.shape)} {d.dtype}, {human(d.nbytes)}"),
        ("placement", d.placement or "whole on one rank"),
    ]
    if d.states:
        rows.append(("optimizer", ", ".join(d.states)))
    if d.copies:
        rows.append(("copies", f"{d.copies}; --verify compares them"))
    rows.append(("pieces", str(len(d.pieces))))
    _rows(rows)
    for piece in d.pieces[:_PIECES]:
        place = ""
        if piece.start is not None and piece.shape is not None:
            ends = (f"{a}:{a + n}" for a, n in zip(piece.start, piece.shape, strict=True))
            place = f"[{', '.join(ends)}] of the tensor"
        gaps = "" if piece.contiguous else ", with gaps"
        click.echo(f"  {_short(piece.path)} at {piece.offset}, {piece.nbytes} bytes{gaps}  {place}")
    if len(d.pieces) > _PIECES:
        click.echo(f"  ... {len(d.pieces) - _PIECES} more; --json lists all")
    if d.stats is None:
        return
    s = d.stats
    _rows([("values", f"{s.size:,}: {s.zeros:,} zeros, {s.nan:,} NaN, {s.inf:,} infinite")])
    if s.mean is not None:
        _rows([("range", f"{s.min:.6g} to {s.max:.6g}, mean {s.mean:.6g}, std {s.std:.6g}")])
    if s.histogram is not None:
        _show_histogram(s.histogram)


def _short(path: Path) -> str:
    return "/".join(path.parts[-2:])


def _show_histogram(h: Histogram) -> None:
    most = max(h.counts)
    if h.below:
        click.echo(f"  {'below':>12}  {h.below:,}")
    for low, count in zip(h.edges, h.counts, strict=False):
        bar = "█" * round(count / most * _BAR) if most else ""
        click.echo(f"  {low:12.4g}  {bar or ('▏' if count else '')} {count:,}")
    if h.above:
        click.echo(f"  {'above':>12}  {h.above:,}")


def show_verification(path: Path, v: Verification) -> None:
    """Print what was checked and what was not."""
    done = ", ".join(f"{n:,} {what}" for what, n in v.checked.items())
    _rows(
        [
            ("path", str(path)),
            ("read", human(v.nbytes)),
            ("checked", done or "nothing"),
            ("result", "sound" if v.sound else f"{counted(len(v.problems), 'problem')}"),
        ]
    )
    for note in v.notes:
        _rows([("note", note)])
