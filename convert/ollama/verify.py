"""Verify a stored model: every blob's bytes, and whether they say the same.

What a server checks late or never: digests, sizes, parameter names and types, the template's
syntax, the config against the GGUF's own header.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ...errors import MconvError
from ..gguf import open_gguf
from .go_template import parse_template
from .layers import CONFIG_TYPE, LAYER_KINDS, LAYER_PREFIX, Layer, file_type_name
from .modelfile import ROLES
from .names import ModelName
from .parameters import ParameterValue, check_parameters
from .store import Manifest, Progress, Store, hash_file

_MAX_TEXT = 16 << 20


def verify(store: Store, name: ModelName, progress: Progress | None = None) -> tuple[str, ...]:
    """Return what is wrong with a stored model; nothing if it is whole.

    Raises:
        FormatError: the model is not there, or its manifest cannot be read.
    """
    manifest = store.read(name)
    problems = [p for layer in manifest.blobs() for p in _blob(store, layer, progress)]
    return tuple(problems or [*_kinds(manifest), *_contents(store, manifest)])


def _blob(store: Store, layer: Layer, progress: Progress | None) -> Iterator[str]:
    path = store.blob_path(layer.digest)
    if not path.is_file():
        yield f"{path}: is missing"
    elif path.stat().st_size != layer.size:
        yield f"{path}: has {path.stat().st_size} bytes, the manifest says {layer.size}"
    elif (found := hash_file(path, progress)) != layer.digest:
        yield f"{path}: is damaged: its digest is {found}"


def _kinds(manifest: Manifest) -> Iterator[str]:
    if manifest.config.type != CONFIG_TYPE:
        yield f"the config has media type {manifest.config.type}"
    for layer in manifest.layers:
        if layer.type.removeprefix(LAYER_PREFIX) not in LAYER_KINDS:
            yield f"layer {layer.digest} has the unknown media type {layer.type}"
    if not any(layer.type == f"{LAYER_PREFIX}model" for layer in manifest.layers):
        yield "there is no model layer"


def _contents(store: Store, manifest: Manifest) -> Iterator[str]:
    try:
        config = json.loads(_text(store, manifest.config))
    except ValueError as error:
        yield f"the config is not JSON: {error}"
        return
    for layer in manifest.layers:
        kind = layer.type.removeprefix(LAYER_PREFIX)
        try:
            if kind == "model":
                yield from _model(store, layer, config)
            elif kind == "template":
                parse_template(_text(store, layer))
            elif kind == "params":
                check_parameters(_parameters(json.loads(_text(store, layer))))
            elif kind == "messages":
                yield from _messages(json.loads(_text(store, layer)))
        except (MconvError, ValueError) as error:
            yield f"the {kind} layer: {error}"


def _text(store: Store, layer: Layer) -> str:
    if layer.size > _MAX_TEXT:
        raise ValueError(f"{layer.size} bytes is too large")
    return store.blob_path(layer.digest).read_text(encoding="utf-8")


def _model(store: Store, layer: Layer, config: Any) -> Iterator[str]:
    gguf = open_gguf(store.blob_path(layer.digest))
    facts = {
        "model_format": "gguf",
        "model_family": gguf.get("general.architecture"),
        "file_type": file_type_name(gguf.get("general.file_type")),
    }
    for key, value in facts.items():
        if config.get(key) != value:
            yield f"the config says {key} is {config.get(key)!r}, the model says {value!r}"


def _parameters(value: Any) -> dict[str, ParameterValue]:
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}


def _messages(value: Any) -> Iterator[str]:
    for message in value:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            yield f"the messages layer: {message!r} is no message"
