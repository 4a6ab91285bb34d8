"""PEFT adapters merged onto a base model: LoRA, rsLoRA and DoRA.

``adapter_config.json`` says rank, alpha and variants, ``adapter_model.safetensors`` (or ``.bin``)
holds ``base_model.model.<module>.lora_A.weight`` and so on; whole modules (``modules_to_save``,
biases) replace the base's. Whatever would be merged wrongly is refused by name. Source: PEFT
``tuners/lora/{config,layer,model}.py``, ``utils/save_and_load.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, UnsupportedError, did_you_mean
from .assets import load_json
from .checkpoint import Checkpoint
from .chunked import Chunked
from .low_rank import LowRank, Sum
from .records import StoredTensor
from .safetensors_header import read_header
from .source import FileSource
from .stored import lazy
from .tensor import LazyTensor
from .torchfile import open_torch_file

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?:\.(?P<adapter>[^.]+?))??(?:\.(?P<kind>weight|bias))?$"
)
_SAVED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.[^.]+)?)(?=\.(?:weight|bias)$)")
_REFUSED = (
    ("target_parameters", "adapters on bare parameters (fused experts)"),
    ("layer_replication", "replicated layers"),
    ("use_qalora", "QA-LoRA"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("trainable_token_indices", "trainable tokens"),
)
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, slots=True)
class Adapter:
    """Settings and tensors of an adapter folder.

    Attributes:
        settings: ``adapter_config.json``.
        modules: {module: {part: tensor}}, parts as ``lora_A``, ``lora_B.bias``.
        whole: tensors that replace the base's.
    """

    folder: Path
    settings: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, LazyTensor]]
    whole: Tensors


def merge_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """Return the base with an adapter merged in; nothing is read or computed yet.

    The optimizer and the copies of changed tensors are dropped: they belong to the base.

    Args:
        base: with Hugging Face names.
        folder: of the adapter, or one of its files.

    Raises:
        FormatError: no or broken adapter, tensors that do not fit the base.
        ConfigError: settings that contradict the tensors.
        UnsupportedError: kinds of adapters that mconv cannot merge.
    """
    if base.naming != "hf":
        raise UnsupportedError(
            f"{base.path}: an adapter can be merged onto Hugging Face names only, these are "
            f"{base.naming}; bring the base into them first: mconv reshard {base.path} BASE"
        )
    adapter = read_adapter(folder if folder.is_dir() else folder.parent)
    weights = dict(base.weights)
    for name, tensor in adapter.whole.items():
        target = _target(adapter, base, name)
        if tensor.shape != weights[target].shape:
            raise FormatError(
                f"{adapter.folder}: {name} is {list(tensor.shape)}, the base's is "
                f"{list(weights[target].shape)} (a resized vocabulary?)"
            )
        weights[target] = tensor.cast(weights[target].dtype)
    changed = [_target(adapter, base, n) for n in adapter.whole]
    for module, parts in adapter.modules.items():
        target = _target(adapter, base, f"{module}.weight")
        scale = adapter_scale(adapter, module, parts)
        weights[target] = _merged(adapter, module, weights[target], parts, scale)
        changed.append(target)
        if "lora_B.bias" in parts:
            bias = _target(adapter, base, f"{module}.bias")
            weights[bias] = Sum(weights[bias], parts["lora_B.bias"], scale)
    kind = "DoRA" if adapter.settings.get("use_dora") else "LoRA"
    note = (
        f"{kind} adapter {adapter.folder.name} is merged: {len(adapter.modules)} updates, "
        f"{len(adapter.whole)} whole tensors"
    )
    copies = {n: c for n, c in base.replicas.items() if n not in changed}
    return replace(
        base,
        weights=weights,
        optimizer={},
        scalars={},
        step=None,
        replicas=copies,
        warnings=(*base.warnings, note),
    )


# -- reading --------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder; no tensor data yet.

    Raises:
        FormatError, ConfigError, UnsupportedError: as ``merge_adapter``.
    """
    path = folder / CONFIG
    settings = load_json(path)
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    _refuse(path, settings)
    file = next((folder / n for n in FILES if (folder / n).is_file()), None)
    if file is None:
        raise FormatError(f"{folder}: has {CONFIG}, but neither of {', '.join(FILES)}")
    modules: dict[str, dict[str, LazyTensor]] = {}
    whole: dict[str, LazyTensor] = {}
    for key, tensor in _tensors(file).items():
        name = key.removeprefix(_PREFIX)
        if match := _PART.match(name):
            part = match["part"] + (".bias" if match["kind"] == "bias" else "")
            if modules.setdefault(match["module"], {}).setdefault(part, tensor) is not tensor:
                raise FormatError(f"{file}: holds several adapters; {name} is there twice")
        elif "lora_" in name or ".token_adapter." in name:
            raise UnsupportedError(f"{file}: {key!r} is no part of an adapter that mconv knows")
        else:
            whole[_SAVED.sub("", name)] = tensor
    if not modules and not whole:
        raise FormatError(f"{file}: holds no tensors")
    return Adapter(folder, settings, modules, whole)


def _refuse(path: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{path}: an adapter of the kind {kind!r}; mconv merges LoRA, rsLoRA and DoRA"
        )
    for key, what in _REFUSED:
        if settings.get(key):
            raise UnsupportedError(f"{path}: {what} ({key}) cannot be merged")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise UnsupportedError(
            f"{path}: {start} training changed the base weights as well, so the original base is "
            "the wrong one; convert the adapter to plain LoRA with PEFT first "
            "(path_initial_model_for_weight_conversion)"
        )


def _tensors(file: Path) -> dict[str, LazyTensor]:
    if file.suffix == ".safetensors":
        header = read_header(file)
        source = FileSource(file, header.file_size)
        return {
            n: Chunked.contiguous(source, e.start, e.shape, e.dtype)
            for n, e in header.tensors.items()
        }
    root = open_torch_file(file).root
    if not isinstance(root, dict):
        raise FormatError(f"{file}: holds no state dict but a {type(root).__name__}")
    return {str(k): lazy(v) for k, v in root.items() if isinstance(v, StoredTensor)}


# -- merging --------------------------------------------------------------------------------------


def _target(adapter: Adapter, base: Checkpoint, name: str) -> str:
    """Return the base's name of a tensor; models are saved with or without ``model.``."""
    for known in (name, f"model.{name}", name.removeprefix("model.")):
        if known in base.weights:
            shared = [a for a, o in base.tied.items() if o == known]
            if shared and name.endswith(".weight"):
                raise UnsupportedError(
                    f"{adapter.folder}: changes {known}, which the base shares with {shared[0]}: "
                    "what shall become of that one is not in the adapter"
                )
            return known
        if known in base.tied:
            raise UnsupportedError(
                f"{adapter.folder}: changes {known}, which the base shares with "
                f"{base.tied[known]}: what shall become of that one is not in the adapter"
            )
    raise FormatError(
        f"{adapter.folder}: changes {name}, which the base {base.path} does not have"
        f"{did_you_mean(name, base.weights)}: it belongs to another model"
    )


def adapter_scale(adapter: Adapter, module: str, parts: Mapping[str, LazyTensor]) -> float:
    """Return the factor of a module's update: alpha / r, or alpha / sqrt(r) with rsLoRA.

    Raises:
        FormatError, ConfigError: settings that do not fit the tensors.
    """
    settings = adapter.settings
    first = parts.get("lora_A", parts.get("lora_embedding_A"))
    if first is None or first.ndim != 2:
        raise FormatError(f"{adapter.folder}: {module} has no lora_A matrix")
    rank = _by_pattern(settings.get("rank_pattern"), module, settings.get("r"))
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha"))
    if rank != first.shape[0]:
        raise ConfigError(
            f"{adapter.folder / CONFIG}: the rank of {module} is {rank}, its lora_A has "
            f"{first.shape[0]} rows: the files do not belong together"
        )
    if not isinstance(alpha, int | float) or rank < 1:
        raise ConfigError(f"{adapter.folder / CONFIG}: lora_alpha is {alpha!r}, r is {rank!r}")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_pattern(patterns: object, module: str, default: Any) -> Any:
    """The value of the first pattern that the module's name ends with, as PEFT matches them."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                return value
        except re.error:
            continue
    return default


def _merged(
    adapter: Adapter,
    module: str,
    weight: LazyTensor,
    parts: Mapping[str, LazyTensor],
    scale: float,
) -> LazyTensor:
    if "lora_embedding_A" in parts:
        a, b = parts.get("lora_embedding_B"), parts["lora_embedding_A"]
        if a is not None:
            a, b = a.permute((1, 0)), b.permute((1, 0))
    else:
        a, b = parts.get("lora_A"), parts.get("lora_B")  # type: ignore[assignment]  # checked next
    magnitude = parts.get("lora_magnitude_vector")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or weight.ndim != 2:
        raise FormatError(f"{adapter.folder}: {module} needs two matrices, lora_A and lora_B")
    if bool(adapter.settings.get("use_dora")) != (magnitude is not None):
        raise ConfigError(
            f"{adapter.folder}: use_dora is {adapter.settings.get('use_dora')}, but {module} has "
            f"{'a' if magnitude is not None else 'no'} lora_magnitude_vector"
        )
    turned = bool(adapter.settings.get("fan_in_fan_out")) and "lora_A" in parts
    whole = weight.permute((1, 0)) if turned else weight
    rows, columns = whole.shape
    fits = b.shape == (rows, a.shape[0]) and a.shape[1] == columns
    if not fits or (magnitude is not None and magnitude.size != rows):
        raise FormatError(
            f"{adapter.folder}: {module}: lora_B {list(b.shape)} and lora_A {list(a.shape)} do not "
            f"fit the base's weight {list(weight.shape)}"
        )
    if magnitude is not None:
        magnitude = magnitude.reshape((rows,))
    merged: LazyTensor = LowRank(whole, a, b, scale, magnitude)
    return merged.permute((1, 0)) if turned else merged
