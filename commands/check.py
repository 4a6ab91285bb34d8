"""``mconv check SRC``."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import counted
from .options import (
    human,
    model_options,
    progress_bar,
    render_options,
    show_json,
    source_options,
    warn,
)

if TYPE_CHECKING:
    from ..convert.check import ModelCheck, TensorCheck


@click.command("check")
@click.argument("src", type=click.Path())
@click.option("--type", "kind", default="f16", show_default=True, help="Type of the output.")
@click.option("--out", type=click.Path(), default="model.gguf", help="Where it would go.")
@click.option("--pre", help="Pre-tokenizer name, if its structure is not recognised.")
@click.option("--scan", is_flag=True, help="Read all weights and look for values that do not fit.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@model_options
@source_options
@render_options
def command(
    src: str,
    kind: str,
    out: str,
    pre: str | None,
    scan: bool,
    tensors: bool,
    weights: str,
    vocab_size: int | None,
    tokenizer: str | None,
    verify: bool,
    config: str | None,
    source_format: str | None,
    adapter: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Tell whether and how the checkpoint SRC becomes GGUF. Writes nothing.

    Lists everything that is in the way at once; exits with 2 then.
    """
    from ..convert.check import check_model
    from ..shardio import open_checkpoint

    ckpt = open_checkpoint(src, format=source_format, config=config, adapter=adapter)
    with progress_bar(f"check {Path(src).name}", shown=scan and not (quiet or as_json)) as progress:
        result = check_model(
            ckpt, kind, out=out, tokenizer=tokenizer, pre=pre, weights=weights,
            vocab_size=vocab_size, scan=scan, progress=progress,
        )  # fmt: skip
    if as_json:
        show_json({**asdict(result), "passed": result.passed})
    elif not quiet:
        given = {"--config": config, "--tokenizer": tokenizer, "--format": source_format,
                 "--adapter": adapter, "--vocab-size": vocab_size, "--pre": pre,
                 "--weights": weights if weights != "model" else None}  # fmt: skip
        _show(result, every=tensors, given=given)
    for problem in result.problems:
        click.echo(f"{click.style('problem:', fg='red')} {problem}", err=True)
    if not result.passed:
        raise click.exceptions.Exit(2)


def _show(r: ModelCheck, *, every: bool, given: dict[str, Any]) -> None:
    rows = [("path", f"{r.path} ({r.format})"), ("architecture", r.architecture or "unknown")]
    if r.notes:
        rows.append(("note", r.notes))
    if r.vocabulary is not None:
        v = r.vocabulary
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in v.kinds.items())
        rows += [
            (
                "vocabulary",
                f"{v.model} {v.pre}: {v.tokens:,} tokens ({kinds}), {counted(v.merges, 'merge')}",
            ),
            ("specials", " ".join(f"{role}={n}" for role, n in v.specials.items()) or "none"),
            ("template", "yes" if v.chat_template else "none"),
        ]
    if r.ignored:
        rows.append(("left out", f"{counted(len(r.ignored), 'tensor')}, such as {r.ignored[0]}"))
    if r.tensors:
        rows += [
            ("tensors", f"{len(r.tensors)}: {_types(r.tensors)}"),
            ("file", f"{r.type}, {human(r.nbytes)}; {human(r.free)} free"),
            ("memory", f"up to {human(r.memory)} at work"),
        ]
    for key, value in rows:
        click.echo(f"{click.style(key.rjust(12), bold=True)}  {value}")
    for t in r.tensors if every else ():
        hazard = f"  {click.style(t.hazard, fg='yellow')}" if t.hazard else ""
        click.echo(f"  {t.name:34} {t.dtype:8} -> {t.type:6} {list(t.shape)!s:20} "
                   f"{human(t.nbytes):>10}  {t.source}{hazard}")  # fmt: skip
    warn((*r.warnings, *_hazards(r)))
    if r.passed:
        words = ["mconv", "to-gguf", str(r.path), "OUT.gguf", "--type", r.type.lower()]
        for option, value in given.items():
            words += [option, str(value)] if value is not None else []
        click.echo(f"nothing is in the way: {shlex.join(words)}")


def _types(tensors: tuple[TensorCheck, ...]) -> str:
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for t in tensors:
        sizes[t.type] += t.nbytes
        counts[t.type] += 1
    return ", ".join(f"{counts[kind]} {kind} ({human(n)})" for kind, n in sizes.most_common())


def _hazards(r: ModelCheck) -> list[str]:
    risky = [t for t in r.tensors if t.hazard]
    if not risky:
        return []
    if not r.scanned:
        return [f"{counted(len(risky), 'tensor')}: {risky[0].hazard}; --scan looks at the values"]
    return [f"{t.source}: {t.hazard}" for t in risky]
