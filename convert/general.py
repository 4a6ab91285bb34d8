"""The ``general.*`` metadata of a model: name, size, licence and whatever its model card tells.

The rules for names and model cards are those of the ``gguf`` package, which llama.cpp's converter
uses, so that both write the same keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Literal

from ..errors import ConfigError
from ..shardio.assets import load_json
from .gguf.values import KeyValue, ValueType


def general_entries(
    architecture: str,
    folder: Path,
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    name: str | None = None,
    override: Path | None = None,
    *,
    adapter: bool = False,
) -> list[KeyValue]:
    """Return ``general.architecture``, ``general.type``, names, size label and the model card.

    Args:
        architecture: GGUF name of the architecture.
        folder: the model's folder: its name, ``README.md`` and ``generation_config.json`` count.
        shapes: (GGUF name, row-major shape) of all tensors, for the parameter count.
        name: the model's name, instead of the one found.
        adapter: the shapes are those of the weights that an adapter changes.
        override: JSON file with ``general.*`` keys that win over what is found.

    Raises:
        ConfigError: the model card or the JSON file cannot be parsed.
    """
    import gguf
    import yaml

    total, shared, experts, count = _parameters(shapes)
    try:
        known = -total if adapter else total  # a negative number is a rough one
        metadata = gguf.Metadata.load(_checked(override), folder, name, known)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{folder / 'README.md'}: the model card's header cannot be read ({error}); correct "
            "it, or remove it to convert without"
        ) from error
    if metadata.name is None:
        metadata.name = folder.name or architecture
    if metadata.size_label is None and total > 0 and not adapter:
        metadata.size_label = gguf.size_label(total, shared, experts, count)
    if metadata.sampling_penalty_repeat is None:
        metadata.sampling_penalty_repeat = _repetition_penalty(folder)
    # a writer without a file only collects the entries
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    writer.add_type(gguf.GGUFType.ADAPTER if adapter else gguf.GGUFType.MODEL)
    if adapter:
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    metadata.set_gguf_meta_model(writer)
    return [_entry(key, value) for key, value in writer.kv_data[0].items()]


def _checked(override: Path | None) -> Path | None:
    """Refuse what the gguf package would overlook: a missing file, another thing than an object."""
    if override is not None and not isinstance(load_json(override), dict):
        raise ConfigError(f"{override}: expected a JSON object of general.* keys")
    return override


def naming(
    entries: Iterable[KeyValue], kind: str, suffix: Literal["vocab", "LoRA"] | None = None
) -> str:
    """Return the file name that GGUF's naming convention gives a model, without ``.gguf``.

    Args:
        entries: its metadata.
        kind: its type, such as ``Q4_K_M``; empty: of a vocabulary alone.
        suffix: ``LoRA`` or ``vocab``.
    """
    import gguf

    values = {e.key: e.value for e in entries}
    name, base, tune, version = (
        values.get(f"general.{k}") for k in ("name", "basename", "finetune", "version")
    )
    label = values.get("general.size_label") if kind else None
    return gguf.naming_convention(name, base, tune, version, label, kind or None, suffix)


def _repetition_penalty(folder: Path) -> float | None:
    """Return ``repetition_penalty`` of the generation settings; gguf before 0.20 overlooks it."""
    path = folder / "generation_config.json"
    try:
        settings = load_json(path) if path.is_file() else {}
    except ConfigError:
        return None
    value = settings.get("repetition_penalty") if isinstance(settings, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _parameters(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[int, int, int, int]:
    """Return parameters in all, outside experts, of one expert, and the number of experts."""
    total = shared = per_expert = experts = stacks = 0
    for name, shape in shapes:
        size = prod(shape)
        total += size
        if "_exps." in name and len(shape) >= 3:
            count = shape[-2 if name.endswith(".bias") else -3]
            per_expert += size // count
            experts += count
            stacks += 1
        else:
            shared += size
    return total, shared, per_expert, experts // stacks if stacks else 0


def _entry(key: str, value: object) -> KeyValue:
    kind = ValueType(int(value.type))  # type: ignore[attr-defined]  # a gguf.GGUFValue
    content = value.value  # type: ignore[attr-defined]
    if kind == ValueType.STRING:  # in YAML a version or a tag may look like a number
        return KeyValue(key, kind, str(content))
    if kind != ValueType.ARRAY:
        return KeyValue(key, kind, content)
    if all(type(item) is int for item in content):
        return KeyValue(key, kind, list(content), ValueType.I32)
    return KeyValue(key, kind, [str(item) for item in content], ValueType.STRING)
