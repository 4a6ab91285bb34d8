"""From text to token files: read, encode, write; all or nothing.

What is made is a folder: ``tokens.npy`` with its starts, marks and ``tokens.json``, and the
tokenizer if one was trained. It is written under a hidden name and renamed when complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ...errors import ConfigError, OutputError
from .chat import ChatEncoder, chat_encoder
from .documents import Chat, Completion, Record, plain_text, read_records, text_files
from .token_file import Encoded, write_token_folder
from .tokenizer import digest, load_tokenizer
from .train_tokenizer import train_tokenizer

_TOGETHER = 256  # texts encoded at once
TOKENIZER = "tokenizer"


@dataclass(frozen=True, slots=True)
class TokenizeReport:
    """What was read and written."""

    folder: Path
    files: int  # number of input files
    about: dict[str, Any]  # what tokens.json says; empty when nothing was written
    tokenizer: Path
    trained: bool  # whether the tokenizer was trained here


def tokenize(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_vocab: int | None = None,
    kind: str = "sentencepiece",
    separator: str = "",
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizeReport:
    """Encode text files into a folder of tokens.

    Args:
        inputs: files or folders (see ``documents.py``).
        out: the folder to make.
        tokenizer: folder of the tokenizer to use.
        train_vocab: train one of so many tokens on the inputs instead, into ``out/tokenizer``.
        kind: of the tokenizer to train, ``sentencepiece`` or ``bpe``.
        separator: what stands between the documents of a ``.txt``.
        force: replace ``out``.
        dry_run: look at the inputs and the tokenizer, write nothing.
        progress: told of bytes done and bytes in all.

    Raises:
        ConfigError: neither or both of ``tokenizer`` and ``train_vocab``, or nothing to read.
        FormatError: an input is damaged.
        OutputError: ``out`` exists.
    """
    if (tokenizer is None) == (train_vocab is None):
        raise ConfigError("give either a tokenizer's folder or the size of one to train")
    out = Path(out)
    files = text_files([Path(p) for p in inputs])
    if out.exists() and not force:
        raise OutputError(f"{out}: exists; replace it with --force")
    if force and out.exists() and not (out / "tokens.json").is_file():
        raise OutputError(f"{out}: was not made by this command; choose another folder")
    place = out / TOKENIZER if tokenizer is None else Path(tokenizer)
    if tokenizer is not None:
        load_tokenizer(place)
    if dry_run:
        return TokenizeReport(out, len(files), {}, place, tokenizer is None)
    part = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        used = place
        if train_vocab is not None:
            used = part / TOKENIZER
            texts = (plain_text(r) for f in files for r in read_records(f, separator))
            train_tokenizer(texts, used, train_vocab, kind)
        about = _write(part, files, used, separator, progress)
        if out.exists():
            shutil.rmtree(out)
        part.replace(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return TokenizeReport(out, len(files), about, place, tokenizer is None)


def _write(
    part: Path,
    files: Sequence[Path],
    tokenizer: Path,
    separator: str,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    loaded = load_tokenizer(tokenizer)
    encoder = chat_encoder(loaded)
    sizes = [path.stat().st_size for path in files]

    def documents() -> Iterator[Encoded]:
        for number, path in enumerate(files):
            before = sum(sizes[:number])

            def told(done: int, before: int = before) -> None:
                if progress:
                    progress(before + done, sum(sizes))

            yield from encode_records(read_records(path, separator, told), encoder, str(path))

    said = {
        "vocab_size": loaded.vocab_size,
        "bos": loaded.bos,
        "eos": loaded.eos,
        "tokenizer_sha256": digest(tokenizer),
    }
    about = write_token_folder(part, documents(), loaded.vocab_size, said)
    if not about["tokens"]:
        raise ConfigError("the inputs hold no text")
    return about


def encode_records(
    records: Iterator[Record], encoder: ChatEncoder, where: str
) -> Iterator[Encoded]:
    """Yield the documents of records, in order; texts are encoded many at a time."""
    number = 0
    for kind, run in groupby(records, key=type):
        while batch := list(islice(run, _TOGETHER)):
            if kind is str:
                texts = [str(text) for text in batch]
                yield from ((ids, None) for ids in encoder.tokenizer.documents(texts))
            for at, record in enumerate(batch, number + 1):
                if isinstance(record, Chat):
                    yield from encoder.conversation(record, f"{where}: record {at}")
                elif isinstance(record, Completion):
                    yield from encoder.completion(record)
            number += len(batch)
