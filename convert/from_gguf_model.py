"""Find out what Hugging Face model a GGUF file holds: family, configuration and tensors.

Several families share a GGUF name; the one whose tensor table fits the file is taken. The file is
untrusted: counts that no tensor bears out are refused before anything is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, UnsupportedError
from .architectures import (
    Architecture,
    Stored,
    architectures,
    complete_config,
    find_architecture,
    restored_config,
)
from .from_gguf_tensors import Restored, refuse, restored_weights
from .gguf import GgufFile
from .gguf.tensors import GgufTensors
from .tokenizers.vocabulary import ID_KEYS

_MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A record, the configuration it gives and the tensors that go with it."""

    architecture: Architecture
    config: dict[str, Any]
    restored: Restored


def find_model(
    file: GgufFile, dtype: np.dtype | None, own: Mapping[str, Any] | None = None
) -> FoundModel:
    """Find the record whose table fits the file's tensors.

    Args:
        file: the open file.
        dtype: of all floating tensors; None: what they are stored in, blocks decoded to 16 bits.
        own: the model's own config.json, instead of one made of the metadata.

    Raises:
        ConfigError: metadata or tensors that do not fit.
        UnsupportedError: no family that is brought back has the name.
    """
    name = file.get("general.architecture")
    if not file.tensors:
        raise ConfigError(f"{file.paths[0]}: holds no tensors, only a vocabulary")
    known = [r for r in architectures().values() if r.restore is not None]
    candidates = [r for r in known if r.name == name]
    if own is not None:
        candidates = [find_architecture(own)]
    if not candidates:
        names = ", ".join(sorted({r.name for r in known}))
        raise UnsupportedError(
            f"{file.paths[0]}: models of the architecture {name!r} are not brought back; those of "
            f"{names} are"
        )
    tried = []
    for record in candidates:
        try:
            config = dict(own) if own is not None else _restored(record, file)
            restored = restored_weights(record, complete_config(config, record), file, dtype)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{file.paths[0]}: the metadata do not make a {record.name} model ({error})"
            ) from error
        if not restored.problems:
            if restored.packed:
                config["quantization_config"] = _MXFP4
            return FoundModel(record, config, restored)
        tried.append((len(restored.problems), restored, record))
    _, restored, record = min(tried, key=lambda one: one[0])
    raise refuse(restored.problems, record, file)


def _restored(record: Architecture, file: GgufFile) -> dict[str, Any]:
    prefix, tensors = f"{record.name}.", GgufTensors(file)
    largest = max((max(info.shape, default=0) for info in file.tensors.values()), default=0)
    for key, most in (("block_count", len(file.tensors)), ("expert_count", largest)):
        value = file.get(f"{prefix}{key}", 0)
        if not isinstance(value, int) or not 0 <= value <= most:
            raise ConfigError(
                f"{file.paths[0]}: {prefix}{key} is {value!r}, the tensors have room for {most}"
            )
    stored = Stored(
        {k.removeprefix(prefix): file[k] for k in file.entries if k.startswith(prefix)},
        {name: info.shape for name, info in file.tensors.items()},
        lambda name: np.asarray(tensors.values(name).read(), np.float32),
    )
    try:
        config = restored_config(record, stored)
    except ConfigError as error:
        raise ConfigError(f"{file.paths[0]}: {error}") from error
    ids = {role: file[key] for role, key in ID_KEYS.items() if key in file}
    for role, index in ids.items():
        config[f"{role}_token_id"] = index
    for role in ("bos", "eos", "pad"):  # classes have numbers of their own for what is not said
        config.setdefault(f"{role}_token_id", None)
    return config
