"""``mconv to-gguf SRC OUT.gguf``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, UnsupportedError, counted
from .options import (
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
from .recipe_options import Asked, error_json, recipe_options, show_errors

if TYPE_CHECKING:
    from ..convert.quantize import QuantizeOptions
    from ..convert.to_gguf import GgufReport


def _refuse_images(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        raise UnsupportedError(
            "multimodal projectors (mmproj) are out of scope: mconv converts text models; "
            "llama.cpp's convert_hf_to_gguf.py --mmproj makes one from the same folder"
        )


@click.command("to-gguf")
@click.argument("src", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--type",
    "kind",
    default="f16",
    show_default=True,
    help="f32, f16, bf16, q8_0, auto, keep (quantized weights keep their bits where a type holds "
    "them), or any mix of `mconv quantize`; several with commas.",
)
@click.option("--name", help="Model name in the metadata (default: from its folder).")
@click.option(
    "--metadata",
    type=click.Path(exists=True, dir_okay=False),
    help="JSON file with general.* keys that win over the model card's.",
)
@click.option("--pre", help="Pre-tokenizer name, if its structure is not recognised.")
@click.option("--vocab-only", is_flag=True, help="Write metadata and vocabulary, no tensors.")
@click.option(
    "--vocab-fix",
    type=click.Choice(["pad", "trim"]),
    help="Where tokenizer and embedding differ in size: pad the smaller, or trim the larger.",
)
@click.option("--lora", is_flag=True, help="SRC is a PEFT adapter: write a GGUF adapter (f32).")
@click.option(
    "--base",
    type=click.Path(exists=True),
    help="With --lora: config.json of the adapter's base model, or its folder.",
)
@click.option("--mmproj", is_flag=True, hidden=True, expose_value=False, callback=_refuse_images)
@recipe_options
@model_options
@source_options
@output_options
@render_options
def command(
    src: str,
    out: str,
    kind: str,
    vocab_only: bool,
    lora: bool,
    base: str | None,
    config: str | None,
    source_format: str | None,
    adapter: str | None,
    max_memory: int,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Convert the checkpoint SRC of any layout to the GGUF file OUT, in one pass.

    In an existing folder OUT the file is named by GGUF's naming convention.

    \b
    mconv to-gguf runs/zero3 model.gguf --type q4_k_m
    mconv to-gguf runs/zero3 model-{type}.gguf --type bf16,q4_k_m,iq4_xs --imatrix imatrix.gguf
    mconv to-gguf megatron/iter_0001000 model.gguf --tokenizer tok/ --vocab-size 32000
    mconv to-gguf runs/zero3 gguf/ --set general.license=mit --max-shard-size 4GB
    mconv to-gguf adapter/ adapter.gguf --lora --base model/
    """
    from ..convert.to_gguf import to_gguf
    from ..shardio import open_checkpoint

    started = time.monotonic()
    recipe = Asked.taken(given, dry_run=dry_run).options()
    if lora:
        made = _lora(src, out, kind, base, recipe, dry_run, given)
        _show((made,), time.monotonic() - started, dry_run, as_json, quiet)
        return
    if out.endswith("/") and not Path(out).is_dir():
        raise ConfigError(f"{out}: no such folder; make it first, or name a .gguf file")
    ckpt: Any = src
    if not vocab_only:
        ckpt = open_checkpoint(src, format=source_format, config=config, adapter=adapter)
    with progress_bar(f"to-gguf {Path(out).name}", shown=not (quiet or as_json)) as progress:
        report = to_gguf(
            ckpt,
            out,
            kind,
            vocab_only=vocab_only,
            config=config if vocab_only else None,
            quantization=recipe,
            dry_run=dry_run,
            limits=limits(max_memory, threads),
            progress=progress,
            **given,
        )
    _show((report, *report.more), time.monotonic() - started, dry_run, as_json, quiet)


def _lora(
    src: str,
    out: str,
    kind: str,
    base: str | None,
    recipe: QuantizeOptions,
    dry_run: bool,
    given: dict[str, Any],
) -> GgufReport:
    """Convert an adapter, to f32 unless a type was asked for."""
    from ..convert.lora_gguf import lora_to_gguf

    if base is None:
        raise ConfigError(
            "--lora needs the config.json of the adapter's base model: --base FILE or FOLDER"
        )
    source = click.get_current_context().get_parameter_source("kind")
    return lora_to_gguf(
        src,
        out,
        kind if source == click.core.ParameterSource.COMMANDLINE else "f32",
        base=base,
        name=given["name"],
        metadata=given["metadata"],
        settings=recipe.settings,
        big_endian=recipe.big_endian,
        force=given["force"],
        dry_run=dry_run,
    )


def _show(
    reports: Sequence[GgufReport], seconds: float, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    if as_json:
        first, *more = [_as_json(one) for one in reports]
        show_json({**first, "more": more, "seconds": round(seconds, 3), "dry_run": dry_run})
        return
    if quiet:
        return
    warn(tuple(dict.fromkeys(text for one in reports for text in one.warnings)))
    verb = "would write" if dry_run else "wrote"
    for one in reports:
        name = one.target.with_name(one.files[0])
        rest = f" and {len(one.files) - 1} more" if len(one.files) > 1 else ""
        click.echo(
            f"{verb} {name}{rest}: {one.architecture} {one.type}, "
            f"{counted(len(one.tensors), 'tensor')}, {human(one.nbytes)} in {seconds:.1f} s"
        )
        show_errors(one.tensors)


def _as_json(report: GgufReport) -> dict[str, Any]:
    return {
        "target": report.target,
        "architecture": report.architecture,
        "type": report.type,
        "nbytes": report.nbytes,
        "tensors": [
            {"name": t.name, "type": t.type.name, "shape": t.shape, **error_json(t)}
            for t in report.tensors
        ],
        "warnings": report.warnings,
        "kept": _kept_json(report),
        "files": report.files,
    }


def _kept_json(report: GgufReport) -> dict[str, Any]:
    """Return how many quantized tensors keep their bits, by type, and why others do not."""
    kept = report.kept
    types = kept.types if kept is not None else {}
    decoded = kept.decoded if kept is not None else ()
    return {"types": types, "decoded": [{"name": name, "why": why} for name, why in decoded]}
