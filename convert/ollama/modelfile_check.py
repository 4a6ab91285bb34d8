"""Look at a Modelfile the way Ollama will: what is wrong, and what is legal but hardly meant.

The grammar accepts much that surprises: a comment behind a value is part of it, a mistyped path is
a model to download, a second TEMPLATE replaces the first, characters vanish. Each becomes a warning
with its line.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import FormatError, did_you_mean
from .modelfile import INSTRUCTIONS, Command, parse
from .modelfile_values import Modelfile, interpret
from .parameters import DEPRECATED

_ONCE = ("template", "system", "adapter", "draft", "renderer", "parser", "requires")
_LOCAL = re.compile(r"^(?:[.~/]|[A-Za-z]:\\)|\.(?:gguf|safetensors|bin)$|\\")
_VERSION = re.compile(r"v?\d+(?:\.\d+){0,2}(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?")
_ESCAPE = re.compile(r'\\[nrt"]')


@dataclass(frozen=True, slots=True)
class Checked:
    """A legal Modelfile and what is odd about it (``path:line: text``)."""

    modelfile: Modelfile
    warnings: tuple[str, ...]


def check_modelfile(path: Path) -> Checked:
    """Read a Modelfile and look for what is wrong or hardly meant.

    Raises:
        FormatError: Ollama refuses it; the message has the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    commands = parse(data, str(path))
    modelfile = interpret(commands, str(path))
    found = sorted(
        [*_each(commands), *_repeated(commands), *_paths(commands, path.parent)],
        key=lambda warning: warning[0],
    )
    return Checked(modelfile, tuple(f"{path}:{line}: {text}" for line, text in found))


def _each(commands: Sequence[Command]) -> Iterator[tuple[int, str]]:
    """Warnings about single commands."""
    for command in commands:
        name, raw, line = command.name, command.raw, command.line
        if command.dropped:
            shown = ", ".join(
                f"U+{ord(c):04X} {unicodedata.name(c, '')}".strip()
                for c in sorted(set(command.dropped))[:5]
            )
            yield line, f"Ollama drops {len(command.dropped)} characters of this line: {shown}"
        if "\r" in command.value:
            yield line, "the value contains carriage returns; save the file with Unix line ends"
        if not raw.startswith('"') and re.search(r"\s#", raw):
            yield line, f"{raw!r}: a comment behind a value is part of the value"
        if raw.startswith("'") and raw.endswith("'") and len(raw) > 1:
            yield line, "single quotes are part of the value; use double quotes"
        if name in ("stop", "system") and _ESCAPE.search(command.value):
            yield line, "there are no escapes: a backslash stays a backslash; write a real newline"
        if name in DEPRECATED:
            yield line, f"parameter {name} is ignored by current releases"
        elif command.parameter and name in (*INSTRUCTIONS, "model"):
            meant = "FROM" if name == "model" else name.upper()
            yield line, f"PARAMETER {name} acts as {meant}; write {meant}"
        elif name == "adapter":
            yield line, "releases from 0.34.1 refuse ADAPTER; merge the adapter into the model"
        elif name in ("renderer", "parser"):
            yield (
                line,
                (f"{name.upper()} is refused before 0.12, and an unknown one fails at every chat"),
            )
        elif name == "requires":
            yield line, "REQUIRES is refused by clients before 0.14"
            if not _VERSION.fullmatch(command.value):
                yield line, f"{command.value!r} is no version such as 0.14.0"
        elif name == "draft":
            yield line, "DRAFT is refused before 0.30"
            if any(c.name == "model" and c.value == command.value for c in commands):
                yield line, "DRAFT must be another model than FROM"


def _repeated(commands: Sequence[Command]) -> Iterator[tuple[int, str]]:
    """Warnings about commands of which the last one wins."""
    seen: dict[str, int] = {}
    for command in commands:
        name = command.name
        if name in seen and (name in _ONCE or (command.parameter and name != "stop")):
            yield command.line, f"{name} replaces that of line {seen[name]}"
        seen[name] = command.line


def _paths(commands: Sequence[Command], folder: Path) -> Iterator[tuple[int, str]]:
    """Warnings about FROM lines that are no file, or a file that Ollama cannot take."""
    for command in commands:
        if command.name not in ("model", "adapter", "draft"):
            continue
        path = folder / Path(command.value).expanduser()
        what = "FROM" if command.name == "model" else command.name.upper()
        if not path.exists() and _LOCAL.search(command.value):
            near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            yield (
                command.line,
                (
                    f"{what} {command.value}: there is no such file"
                    f"{did_you_mean(path.name, near)}; Ollama takes it for a model to download"
                ),
            )
        elif path.is_file() and path.suffix == ".safetensors":
            yield command.line, f"{what} takes a GGUF file or a folder, not one safetensors file"
        elif path.is_dir() and command.name == "model":
            yield (
                command.line,
                ("FROM a folder is converted only by releases before 0.34.1; name a GGUF file"),
            )
