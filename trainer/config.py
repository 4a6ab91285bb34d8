"""The configuration of a training run: frozen dataclasses, read from TOML.

One section of the file per dataclass: ``[model] [train] [optim] [schedule] [data] [save]``. Unknown
sections and keys are refused with the nearest known name; every value that can be wrong on its own
is checked here, before anything is allocated. Nothing here imports torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ..errors import ConfigError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes of a Llama-family decoder, under the names of Hugging Face's ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        _at_least("model.num_key_value_heads", kv_heads, 1)
        if heads % kv_heads:
            raise ConfigError(
                f"model.num_attention_heads={heads} is not a multiple of num_key_value_heads="
                f"{kv_heads}"
            )
        if self.hidden_size % heads or self.head_dim % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} over num_attention_heads={heads} gives no "
                "even head size, which rotary positions need"
            )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_hf(self, **more: Any) -> dict[str, Any]:
        """Return the ``config.json`` of a ``LlamaForCausalLM``; ``more`` adds or replaces keys."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **more,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the sizes of a ``config.json``.

        Raises:
            ConfigError: another architecture or a variant that the decoder lacks, or a size is
                missing.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        built = _build(
            cls,
            {
                "rope_theta": float(rope.get("rope_theta", 10000.0)),
                **{f.name: config[f.name] for f in fields(cls) if f.name in config},
            },
            "config.json",
        )
        wanted = {
            "model_type": "llama",
            "hidden_act": "silu",
            "head_dim": built.head_dim,
            "attention_bias": False,
            "mlp_bias": False,
        }
        for key, value in wanted.items():
            if config.get(key, value) not in (value, None):
                raise ConfigError(
                    f"config.json: {key} is {config[key]!r}; the trainer's decoder has {value!r}"
                )
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"config.json: the trainer's decoder has no rope type {kind!r}")
        return built


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and on how much.

    Attributes:
        steps: optimizer steps.
        seq_len: tokens per sequence.
        batch: sequences per step, over all ranks.
        seed: of the initial weights and of the order of the data.
        clip: largest gradient norm.
        threads: CPU threads per rank; 0 shares the machine's cores among the ranks.
    """

    steps: int
    seq_len: int
    batch: int
    seed: int = 0
    clip: float = 1.0
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "batch"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        _at_least("train.threads", self.threads, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW; weight decay is for matrices only."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """``warmup`` steps of linear rise, then half a cosine down to ``floor`` times the peak."""

    warmup: int = 0
    floor: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """``tokens``: a one-dimensional ``.npy`` file; ``tokenizer``: its folder, saved along."""

    tokens: Path
    tokenizer: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveConfig:
    """``folder`` of the run: checkpoints, logs and metrics."""

    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    data: DataConfig
    save: SaveConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def check_world(self, world_size: int) -> None:
        """Refuse a number of processes that does not divide the batch.

        Raises:
            ConfigError: it does not.
        """
        if self.train.batch % world_size:
            raise ConfigError(
                f"train.batch={self.train.batch} is not a multiple of {world_size} processes; "
                f"use {-(-self.train.batch // world_size) * world_size}"
            )


def load_config(path: Path) -> RunConfig:
    """Read a run's TOML file; relative paths in it are relative to the file's folder.

    Raises:
        ConfigError: unreadable, not TOML, unknown or missing keys, or values that cannot be.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error})") from error
    return _build(RunConfig, data, str(path), path.resolve().parent)


def dump_config(config: RunConfig, folder: Path) -> str:
    """Return the TOML text that ``load_config`` reads back as ``config`` from a file in ``folder``.

    Paths inside the (absolute) folder are written relative to it.
    """
    sections = []
    for name, section in asdict(config).items():
        lines = [f"{key} = {_toml(value, folder)}" for key, value in section.items()]
        sections.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(sections) + "\n"


def _toml(value: object, folder: Path) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Path):
        inside = value.relative_to(folder) if value.is_relative_to(folder) else value
        return json.dumps(inside.as_posix(), ensure_ascii=False)  # TOML's escapes are JSON's
    return repr(value)


def _build(kind: type[T], data: Mapping[str, Any], where: str, base: Path | None = None) -> T:
    """Return the dataclass ``kind`` of a mapping whose keys are its fields."""
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


def _value(kind: type, value: Any, where: str, base: Path | None) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is a section ([...]), not {value!r}")
        return _build(kind, value, where, base)
    if kind is Path and isinstance(value, str):
        return base / value if base else Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return value


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}")
