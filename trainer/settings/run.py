"""The configuration of a training run: frozen dataclasses, read from TOML.

One section of the file per dataclass of ``sections.py`` and ``model.py``. Unknown sections
and keys are refused with the nearest known name. ``[model]`` may give ``path``, a folder whose
``config.json`` has the sizes, and override some. Nothing here imports torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ...convert.naming import to_hf
from ...errors import ConfigError, did_you_mean
from ...shardio import open_checkpoint
from .model import ModelConfig
from .sections import (
    DataConfig,
    EvalConfig,
    ExportConfig,
    ImatrixConfig,
    LogConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    SaveConfig,
    ScheduleConfig,
    TrainConfig,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    data: DataConfig
    save: SaveConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    imatrix: ImatrixConfig = field(default_factory=ImatrixConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


def load_config(path: Path, settings: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML file; relative paths in it are relative to the file's folder.

    Args:
        path: the file.
        settings: ``section.key=value`` each, replacing what the file says; values as in TOML, where
            text needs no quotes.

    Raises:
        ConfigError: unreadable, not TOML, unknown or missing keys, or values that cannot be.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error})") from error
    for setting in settings:
        _set(data, setting)
    base = path.resolve().parent
    model = data.get("model")
    if isinstance(model, dict):
        data["model"] = _with_sizes(model, base)
    return build(RunConfig, data, str(path), base)


def _set(data: dict[str, Any], setting: str) -> None:
    """Put ``a.b=c`` into the tables of ``data``."""
    name, equals, text = setting.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2:
        raise ConfigError(f"--set {setting}: expected section.key=value, such as optim.lr=3e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()  # text without quotes
    table = data
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting}: {key} is no section")
    table[keys[-1]] = value


def _with_sizes(model: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return ``[model]`` with the sizes of ``path``, or else of the checkpoint it starts from."""
    own = {k: v for k, v in model.items() if k != "path"}
    if "path" in model:
        path = base / str(model["path"]) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
    elif "init_from" in model and "hidden_size" not in model:
        source = base / str(model["init_from"])
        config = to_hf(open_checkpoint(source)).config
        if config is None:
            raise ConfigError(f"{source}: has no config.json; give the sizes in [model]")
    else:
        return own
    sizes = asdict(ModelConfig.from_hf(config))
    return {k: v for k, v in sizes.items() if v is not None} | own


def build(kind: type[T], data: Mapping[str, Any], where: str, base: Path | None = None) -> T:
    """Return the dataclass ``kind`` of a mapping whose keys are its fields.

    Args:
        kind: a dataclass.
        data: its values, as TOML has them.
        where: what an error names.
        base: folder that relative paths start from.

    Raises:
        ConfigError: unknown or missing keys, or values of another type.
    """
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # T is one of our dataclasses
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")
    for key, item in known.items():
        required = item.default is MISSING and item.default_factory is MISSING
        if required and key not in data:
            raise ConfigError(f"{where}: {key!r} is missing")
    return kind(**{k: _value(hints[k], v, f"{where}: {k}", base) for k, v in data.items()})


def _value(kind: Any, value: Any, where: str, base: Path | None) -> Any:
    if get_origin(kind) in (Union, UnionType):  # X | None
        kind = next(k for k in get_args(kind) if k is not NoneType)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is a section ([...]), not {value!r}")
        return build(kind, value, where, base)  # type: ignore[arg-type]  # a class
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list ([...]), not {value!r}")
        return tuple(_value(get_args(kind)[0], v, where, base) for v in value)
    if kind is Path and isinstance(value, str):
        return base / value if base else Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return value
