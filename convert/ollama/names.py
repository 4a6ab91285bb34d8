"""Names of Ollama models: ``host/namespace/model:tag`` and where they lie in a store.

Source: Ollama's rules: missing parts are ``registry.ollama.ai``, ``library`` and ``latest``; a part
begins with a letter, digit or underscore and has at most 80 characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_DEFAULT_HOST, _DEFAULT_NAMESPACE, _DEFAULT_TAG = "registry.ollama.ai", "library", "latest"


@dataclass(frozen=True, slots=True)
class ModelName:
    """The four parts of a name."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        parts = [self.model]
        if self.namespace != _DEFAULT_NAMESPACE or self.host != _DEFAULT_HOST:
            parts.insert(0, self.namespace)
        if self.host != _DEFAULT_HOST:
            parts.insert(0, self.host)
        return f"{'/'.join(parts)}:{self.tag}"

    @property
    def path(self) -> Path:
        """The manifest's path below ``manifests``."""
        return Path(self.host, self.namespace, self.model, self.tag)


def parse_name(text: str) -> ModelName:
    """Return a name with all its parts.

    Raises:
        ConfigError: a part has illegal characters, or there are too many.
    """
    parts = text.split("/")
    model, _, tag = parts[-1].partition(":")
    if len(parts) > 3:
        raise ConfigError(f"model name {text!r}: expected [HOST/][NAMESPACE/]MODEL[:TAG]")
    namespace = parts[-2] if len(parts) > 1 else _DEFAULT_NAMESPACE
    host = parts[0] if len(parts) > 2 else _DEFAULT_HOST
    if tag == "" and parts[-1].endswith(":"):
        raise ConfigError(f"model name {text!r}: the tag behind ':' is missing")
    name = ModelName(host, namespace, model, tag or _DEFAULT_TAG)
    for what, part, rule in (
        ("host", name.host, _HOST), ("namespace", name.namespace, _NAMESPACE),
        ("model", name.model, _PART), ("tag", name.tag, _PART),
    ):  # fmt: skip
        if not rule.fullmatch(part):
            raise ConfigError(
                f"model name {text!r}: {what} {part!r} must begin with a letter, digit or '_' and "
                "have at most 80 letters, digits, '_', '-' (model and tag also '.')"
            )
    return name
