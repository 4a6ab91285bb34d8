"""The layers and the config of a model in Ollama's store.

Source: manifests are of Docker's image format v2; a layer's media type says what it is. Template,
system message and licence are raw text, parameters and messages JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ...quant.recipes.targets import TARGETS
from ..gguf import GgufFile
from .modelfile_values import Modelfile
from .parameters import check_parameters

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_PREFIX = "application/vnd.ollama.image."
#: What may stand behind ``LAYER_PREFIX``.
LAYER_KINDS = (
    "model", "projector", "adapter", "draft", "template", "system", "params", "messages",
    "license", "tensor", "json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """A blob of the store and what it is to a model (``type``: media type)."""

    type: str
    digest: str
    size: int

    def as_json(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return {"mediaType": self.type, "digest": self.digest, "size": self.size}


def text_layers(modelfile: Modelfile) -> list[tuple[str, bytes]]:
    """Return (kind, bytes) of everything but the weights, in Ollama's order.

    Raises:
        ConfigError: a parameter is illegal.
    """
    check_parameters(modelfile.parameters)
    out: list[tuple[str, bytes]] = []
    if modelfile.template is not None:
        out.append(("template", modelfile.template.encode()))
    if modelfile.system is not None:
        out.append(("system", modelfile.system.encode()))
    out += [("license", text.encode()) for text in modelfile.licenses]
    if modelfile.parameters:
        out.append(("params", _json(api_parameters(modelfile))))
    if modelfile.messages:
        messages = [{"role": role, "content": text} for role, text in modelfile.messages]
        out.append(("messages", _json(messages)))
    return out


def api_parameters(modelfile: Modelfile) -> dict[str, Any]:
    """Return the parameters as JSON holds them: ``stop`` is a list."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in sorted(modelfile.parameters.items())
    }


def config_json(gguf: GgufFile, layers: Sequence[Layer], modelfile: Modelfile) -> bytes:
    """Return the config blob of a model."""
    family = str(gguf.get("general.architecture", "unknown"))
    config: dict[str, Any] = {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": human_count(sum(prod(t.shape) for t in gguf.tensors.values())),
        "file_type": file_type_name(gguf.get("general.file_type")),
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
    }
    for key in ("renderer", "parser", "requires"):
        if getattr(modelfile, key) is not None:
            config[key] = getattr(modelfile, key)
    return _json(config)


def manifest_json(config: Layer, layers: Sequence[Layer]) -> bytes:
    """Return the manifest."""
    return _json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": config.as_json(),
            "layers": [layer.as_json() for layer in layers],
        }
    )


def human_count(count: int) -> str:
    """Return a parameter count as Ollama shows it: 121K, 7.62M, 1.5B, whole ones plain."""
    for size, unit, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= size:
            places = 0 if count % size == 0 else digits
            return f"{count / size:.{places}f}{unit}"
    return str(count)


def file_type_name(number: Any) -> str:
    """Return the name of ``general.file_type``, such as ``Q4_K_M``; "unknown" for no known one."""
    return _FILE_TYPES.get(number, "unknown") if isinstance(number, int) else "unknown"


_FILE_TYPES: Mapping[int, str] = {0: "F32"} | {
    target.file_type: name for name, target in TARGETS.items() if not target.copies
}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
