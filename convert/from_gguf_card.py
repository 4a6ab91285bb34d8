"""The small files beside a model that ``general.*`` metadata came from: model card, sampling.

The header of ``README.md`` is the YAML that the Hugging Face hub and llama.cpp's converter read;
``generation_config.json`` holds end tokens and recommended sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .gguf.values import KeyValue

#: ``general`` key to the entry of a model card.
_CARD = (
    ("name", "name"),
    ("author", "author"),
    ("version", "version"),
    ("organization", "organization"),
    ("finetune", "finetune"),
    ("basename", "basename"),
    ("description", "description"),
    ("size_label", "size_label"),
    ("license", "license"),
    ("license.name", "license_name"),
    ("license.link", "license_link"),
    ("source.url", "url"),
    ("source.doi", "doi"),
    ("source.uuid", "uuid"),
    ("source.repo_url", "repo_url"),
    ("tags", "tags"),
    ("languages", "languages"),
)
#: Lists of models or datasets: key of their number, prefix of each, entry of the card.
_LISTS = (
    ("base_model.count", "base_model", "base_models"),
    ("dataset.count", "dataset", "datasets"),
)
#: ``general.sampling`` key to the entry of ``generation_config.json``, where they differ.
_SAMPLING = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
_ENDS = ("eos", "eot", "eom")


def model_card(entries: Mapping[str, KeyValue]) -> bytes:
    """Return a ``README.md`` with what a GGUF file says of the model.

    Args:
        entries: metadata by key.
    """
    import yaml

    card: dict[str, Any] = {}
    for key, name in _CARD:
        entry = entries.get(f"general.{key}")
        if entry is not None:
            card[name] = _plain(entry.value)
    for count, prefix, name in _LISTS:
        if f"general.{count}" in entries:
            card[name] = [
                _members(entries, f"general.{prefix}.{n}.")
                for n in range(int(entries[f"general.{count}"].value))
            ]
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{text}---\n".encode()


def generation_config(entries: Mapping[str, KeyValue], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return ``generation_config.json``.

    Args:
        entries: metadata by key.
        ids: special token ids by role.
    """
    settings: dict[str, Any] = {
        f"{role}_token_id": ids[role] for role in ("bos", "pad") if role in ids
    }
    ends = list(dict.fromkeys(ids[role] for role in _ENDS if role in ids))
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    prefix = "general.sampling."
    sampling = {
        _SAMPLING.get(key.removeprefix(prefix), key.removeprefix(prefix)): _plain(entry.value)
        for key, entry in entries.items()
        if key.startswith(prefix)
    }
    return settings | ({"do_sample": True, **sampling} if sampling else {})


def _members(entries: Mapping[str, KeyValue], prefix: str) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): _plain(entry.value)
        for key, entry in entries.items()
        if key.startswith(prefix)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}")  # the shortest decimal of most 32-bit numbers
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
