"""``mconv tokenize INPUT... -o OUT``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from .options import progress_bar, render_options, show_json

if TYPE_CHECKING:
    from ..trainer.text.tokenize import TokenizeReport


@click.command("tokenize")
@click.argument("inputs", type=click.Path(), nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(), required=True, help="Folder to make.")
@click.option("--tokenizer", type=click.Path(exists=True), help="Folder of the tokenizer to use.")
@click.option(
    "--train-vocab", type=click.IntRange(1), help="Train a tokenizer of so many tokens instead."
)
@click.option(
    "--kind",
    type=click.Choice(["sentencepiece", "bpe"]),
    default="sentencepiece",
    show_default=True,
    help="Kind of tokenizer to train.",
)
@click.option("--separator", default="", help="What stands between the documents of a .txt file.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Look at inputs and tokenizer, write nothing.")
@render_options
def command(
    inputs: tuple[str, ...],
    out: str,
    tokenizer: str | None,
    train_vocab: int | None,
    kind: str,
    separator: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Encode text for training: .txt, .jsonl (text, chats, prompts), .parquet, or folders of them.

    \b
    mconv tokenize corpus/ -o tokens --tokenizer base-model/
    mconv tokenize chats.jsonl -o sft --tokenizer base-model/
    mconv tokenize book.txt -o tokens --train-vocab 4096 --separator '\\n\\n'
    """
    from ..trainer.text.tokenize import tokenize

    started = time.monotonic()
    with progress_bar("tokenize", shown=not (quiet or as_json)) as progress:
        report = tokenize(
            inputs,
            out,
            tokenizer=tokenizer,
            train_vocab=train_vocab,
            kind=kind,
            separator=separator.replace("\\n", "\n"),
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    seconds = time.monotonic() - started
    if as_json:
        said = {"seconds": round(seconds, 3), "dry_run": dry_run}
        show_json({**_json(report), **said})
    elif not quiet:
        _show(report, seconds, dry_run)


def _json(report: TokenizeReport) -> dict[str, Any]:
    return {
        "folder": report.folder,
        "files": report.files,
        **report.about,
        "tokenizer": report.tokenizer,
        "trained": report.trained,
    }


def _show(report: TokenizeReport, seconds: float, dry_run: bool) -> None:
    if dry_run:
        click.echo(f"would encode {report.files} files into {report.folder}")
        return
    about = report.about
    learned = "" if about["learned"] == about["tokens"] else f" ({about['learned']:,} learned)"
    click.echo(
        f"wrote {report.folder}: {about['tokens']:,} tokens{learned} in {about['documents']:,} "
        f"documents from {report.files} files in {seconds:.1f} s"
    )
    if report.trained:
        click.echo(f"trained {report.tokenizer}: {about['vocab_size']:,} tokens")
    click.echo(f'use it: [data] tokens = "{report.folder}", tokenizer = "{report.tokenizer}"')
