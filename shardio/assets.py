"""The small files of a model:

config, tokenizer, chat template. Found beside the weights or a level or two above.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .source import read_small

CONFIG = "config.json"
_NAMES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.json",
    "chat_template.jinja",
)
_MAX_JSON = 64 << 20
_MAX_YAML = 64 << 10


def find_assets(folders: Iterable[Path]) -> tuple[Path, ...]:
    """Return the first file of each known name over ``folders``, nearest folder first."""
    found: dict[str, Path] = {}
    for folder in folders:
        for name in _NAMES:
            path = folder / name
            if name not in found and path.is_file():
                found[name] = path
    return tuple(found[name] for name in _NAMES if name in found)


def around(path: Path, levels: int = 2) -> list[Path]:
    """The folder of a checkpoint and ``levels`` parents: where its config and tokenizer may lie."""
    folder = path if path.is_dir() else path.parent
    return [folder, *list(folder.resolve().parents)[:levels]]


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises ConfigError naming the file when it is missing, huge or malformed.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes is too large for a JSON config")
        return json.loads(read_small(path).decode("utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: is not valid JSON ({e})") from e


def _yaml_loader() -> Any:
    """PyYAML's safe loader, which also takes ``1e-06`` as a number, as training codes' do."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no type stubs
        pass

    number = re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def load_yaml(path: Path, section: str = "") -> Any:
    """Parse a small YAML file, or one top-level section of it (its lines only: settings of training
    runs can list thousands of data files besides).

    Raises ConfigError naming the file when it is missing, too large or malformed.
    """
    import yaml

    try:
        if path.stat().st_size > _MAX_JSON:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes is too large for settings")
        text = read_small(path).decode("utf-8")
        if section:
            match = re.search(rf"^{section}:[^\n]*\n(?:[ \t#][^\n]*\n|\n)*", text + "\n", re.M)
            text = match[0] if match else ""
        if len(text) > _MAX_YAML:
            raise ConfigError(f"{path}: {len(text)} characters are too many for settings")
        found = yaml.load(text, _yaml_loader())
        return found.get(section) if section and isinstance(found, dict) else found
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError, yaml.YAMLError) as e:
        raise ConfigError(f"{path}: is not valid YAML ({str(e)[:200]})") from e


def config_path(assets: Iterable[Path]) -> Path | None:
    """Return the model's configuration among ``assets``: a file that a user gave has any name."""
    for path in assets:
        if path.name == CONFIG or (path.suffix == ".json" and path.name not in _NAMES):
            return path
    return None


def load_config(assets: Iterable[Path]) -> Mapping[str, Any] | None:
    """Return the parsed ``config.json`` among ``assets``, or None."""
    for path in assets:
        if path.name == CONFIG:
            config = load_json(path)
            if not isinstance(config, dict):
                raise ConfigError(f"{path}: expected a JSON object, found {type(config).__name__}")
            return config
    return None
