"""Chat templates: the four places where Hugging Face models keep them, and their GGUF keys.

Sources: ``tokenizer_config.json`` (text, or a list of named templates), ``chat_template.jinja``
with ``additional_chat_templates/*.jinja`` beside it, ``chat_template.json``. A template is stored
as text and never run here.
"""

from __future__ import annotations

import string as alphabet
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ..gguf.values import KeyValue, string, strings
from .files import TokenizerFiles

#: One template, named ones in order, or none.
ChatTemplate = str | tuple[tuple[str, str], ...] | None

_KEY = "tokenizer.chat_template"
_NAME_CHARACTERS = frozenset(alphabet.ascii_letters + alphabet.digits)


def load_chat_template(files: TokenizerFiles) -> ChatTemplate:
    """Return the model's chat template(s); ``tokenizer_config.json`` wins over separate files.

    Raises:
        ConfigError: a file is not valid JSON or not UTF-8 text.
    """
    config = files.json("tokenizer_config.json")
    value: Any = config.get("chat_template") if config else None
    if value is not None:
        return _clean(value)
    text = files.text("chat_template.jinja")
    if text is not None:
        extra = files.texts("additional_chat_templates", "*.jinja")
        return (("default", text), *extra) if extra else text
    separate = files.json("chat_template.json")
    return _clean(separate.get("chat_template")) if separate else None


def template_entries(template: ChatTemplate) -> list[KeyValue]:
    """Return the metadata entries of a chat template. Empty templates leave no trace."""
    if not template:
        return []
    if isinstance(template, str):
        return [string(_KEY, template)]
    named = {name: text for name, text in template if name != "default" and text}
    entries = [string(f"{_KEY}.{name}", text) for name, text in named.items()]
    if named:
        entries.append(strings("tokenizer.chat_templates", sorted(named)))
    default = dict(template).get("default")
    return [*entries, string(_KEY, default)] if default else entries


def _clean(value: object) -> ChatTemplate:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise ConfigError(
            f"tokenizer_config.json: chat_template is a {type(value).__name__}, expected text "
            "or a list of named templates"
        )
    return tuple(_named(item) for item in value if isinstance(item, Mapping) and _usable(item))


def _usable(item: Mapping[str, Any]) -> bool:
    return isinstance(item.get("template"), str) and bool(item.get("name"))


def _named(item: Mapping[str, Any]) -> tuple[str, str]:
    name = "".join(c if c in _NAME_CHARACTERS else "_" for c in str(item["name"]))
    return name, item["template"]
