"""Reading training text: ``.txt``, ``.jsonl`` (also ``.gz``), ``.parquet``, or folders of them.

A record of ``.jsonl`` or ``.parquet`` is a text (``{"text"}``), a conversation (``{"messages"}``,
or ``{"conversations"}`` with ``from`` and ``value``), or a prompt with its completion, both texts
or both lists of messages. Files are read as streams; nothing is kept.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from ...errors import ConfigError, FormatError

_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet")
_BLOCK = 1 << 20
_LONGEST = 256 << 20  # characters of one document
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation."""

    messages: tuple[Mapping[str, Any], ...]  # role, content and whatever else the template knows
    given: int = 0  # so many messages are prompt, whoever said them
    tools: tuple[Mapping[str, Any], ...] = ()  # that the assistant may call, as JSON schemas


@dataclass(frozen=True, slots=True)
class Completion:
    """A text of which only the second part is learned."""

    prompt: str
    completion: str


Record = str | Chat | Completion


def text_files(inputs: Iterable[Path]) -> list[Path]:
    """Return the files of ``inputs``: as given, and those of folders in sorted order.

    Raises:
        ConfigError: nothing there, or a file of an unknown kind.
    """
    found: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise ConfigError(f"{path}: is not there")
        inside = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES))
        if path.is_dir() and not inside:
            raise ConfigError(f"{path}: holds none of {', '.join(_SUFFIXES)}")
        if not path.is_dir() and not path.name.endswith(_SUFFIXES):
            raise ConfigError(f"{path}: cannot be read as text; known: {', '.join(_SUFFIXES)}")
        found += inside if path.is_dir() else [path]
    return found


def read_records(
    path: Path, separator: str = "", told: Callable[[int], None] | None = None
) -> Iterator[Record]:
    """Yield the records of a file.

    Args:
        path: one of ``text_files``.
        separator: what stands between the documents of a ``.txt``; empty: it is one document.
        told: now and then called with the number of bytes of the file read so far.

    Raises:
        FormatError: not of its kind; the message names the line.
        ConfigError: parquet without pyarrow.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with path.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            file = TextIOWrapper(stream, encoding="utf-8", newline="")
            lines = ".jsonl" in path.suffixes
            for record in _lines(file, path) if lines else _texts(file, path, separator):
                yield record
                if told:
                    told(raw.tell())
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def plain_text(record: Record) -> str:
    """Return the words of a record, for the training of a tokenizer."""
    if isinstance(record, str):
        return record
    if isinstance(record, Completion):
        return record.prompt + record.completion
    return "\n".join(str(message.get("content") or "") for message in record.messages)


def _lines(file: TextIO, path: Path) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise FormatError(f"{path}:{number}: not JSON ({error})") from error
            yield _record(row, f"{path}:{number}")


def _texts(file: TextIO, path: Path, separator: str) -> Iterator[str]:
    rest = ""
    while block := file.read(_BLOCK):
        rest += block
        *whole, rest = rest.split(separator) if separator else [rest]
        yield from (text for text in whole if text.strip())
        if len(rest) > _LONGEST:
            raise FormatError(
                f"{path}: a document of more than {_LONGEST >> 20} million characters; say what "
                "stands between documents (separator)"
            )
    if rest.strip():
        yield rest


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    at = 0
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            at += 1
            yield _record(row, f"{path}: row {at}")


def _record(row: object, where: str) -> Record:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise FormatError(f"{where}: expected an object, found {type(row).__name__}")
    tools = tuple(t for t in row.get("tools") or () if isinstance(t, dict))
    if isinstance(row.get("messages"), list):
        return Chat(_messages(row["messages"], where), 0, tools)
    if isinstance(row.get("conversations"), list):
        turns = [m for m in row["conversations"] if isinstance(m, dict)]
        roles = [str(m.get("from")) for m in turns]
        said = [
            {"role": _ROLES.get(role, role), "content": m.get("value")}
            for role, m in zip(roles, turns, strict=True)
        ]
        return Chat(_messages(said, where), 0, tools)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return Chat(_messages([*prompt, *completion], where), len(prompt), tools)
    if isinstance(row.get("text"), str):
        return str(row["text"])
    raise FormatError(
        f"{where}: has {', '.join(sorted(row)) or 'no keys'}; expected text, messages, "
        "conversations, or prompt and completion"
    )


def _messages(rows: list[Any], where: str) -> tuple[Mapping[str, Any], ...]:
    for message in rows:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise FormatError(f"{where}: a message needs a role and a content, not {message!r}")
    if not rows:
        raise FormatError(f"{where}: a conversation without messages")
    return tuple(rows)
