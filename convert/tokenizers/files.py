"""Find and read the small files of a tokenizer: one folder, or the assets of a checkpoint.

All files of a tokenizer come from the same folder, the first one that holds a vocabulary; mixing
``tokenizer.json`` from one place with ``tokenizer_config.json`` from another would mix tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...shardio.assets import load_json

#: Any of these makes a folder a tokenizer folder.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tekken.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A folder with tokenizer files; every getter returns None for a file that is not there."""

    folder: Path
    _parsed: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def path(self, name: str) -> Path | None:
        """Return the path of a file of the folder."""
        path = self.folder / name
        return path if path.is_file() else None

    def json(self, name: str) -> Mapping[str, Any] | None:
        """Return a parsed JSON object.

        Raises:
            ConfigError: the file is not JSON, or not an object.
        """
        path = self.path(name)
        if path is None:
            return None
        if name not in self._parsed:
            value = load_json(path)
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
            self._parsed[name] = value
        found: Mapping[str, Any] = self._parsed[name]
        return found

    def text(self, name: str) -> str | None:
        """Return a UTF-8 text, newlines as ``\\n``.

        Raises:
            ConfigError: the file cannot be read as UTF-8.
        """
        path = self.path(name)
        return None if path is None else _read(path)

    def texts(self, folder: str, pattern: str) -> tuple[tuple[str, str], ...]:
        """Return (stem, text) of all files of a sub-folder, sorted by name."""
        return tuple((p.stem, _read(p)) for p in sorted((self.folder / folder).glob(pattern)))


def find_tokenizer(folder: str | Path | None, assets: Iterable[Path]) -> TokenizerFiles:
    """Return the tokenizer folder: the one given, or the folder of the first vocabulary asset.

    Args:
        folder: a folder (or a file in it) chosen by the user.
        assets: files that came with a checkpoint.

    Raises:
        ConfigError: there is no vocabulary file.
    """
    if folder is not None:
        chosen = Path(folder)
        chosen = chosen.parent if chosen.is_file() else chosen
        if any((chosen / name).is_file() for name in VOCABULARY_FILES):
            return TokenizerFiles(chosen)
        raise ConfigError(f"{chosen}: no tokenizer here: expected {', '.join(VOCABULARY_FILES)}")
    for path in assets:
        if path.name in VOCABULARY_FILES:
            return TokenizerFiles(path.parent)
    raise ConfigError(
        "the checkpoint comes without a tokenizer; pass the folder that holds tokenizer.json or "
        "tokenizer.model (--tokenizer DIR)"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
