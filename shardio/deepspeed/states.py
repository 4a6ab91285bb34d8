"""What one DeepSpeed rank file holds, as checked values.

``ModelState`` is a ``*_model_states.pt``: 16-bit weights (placeholders under stage 3), the order
and shapes of the optimizer's parameters, counters. ``OptimState`` is a ``*_optim_states.pt``: this
rank's part of the fp32 masters and of every optimizer state, as flat vectors per group. Keys follow
``engine.py``, ``stage_1_and_2.py``, ``stage3.py`` and ``bf16_optimizer.py`` of DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ..records import StoredTensor
from ..source import FileSource
from ..stored import plain
from .fields import Fields, Shape
from .folder import load, member

_OWN_KEYS = frozenset({
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes",
    "frozen_param_fragments", "shared_params", "lr_scheduler", "data_sampler", "random_ltd",
    "sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples",
    "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "universal_checkpoint_info", "num_experts", "ds_autoep_layers", "folding",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model-states file.

    Attributes:
        path: the file.
        source: the same, for reading tensors.
        module: state dict, None in pipeline checkpoints.
        buffers: names of persistent buffers.
        groups: per optimizer group (stage 3: sub-group) the parameters in flat order; None if the
            file does not say.
        frozen_shapes, frozen: shapes and (stage 3: cut, flat) data of frozen parameters; None if
            not saved.
        shared: alias to the name that holds the tensor.
        fields: everything else.
    """

    path: Path
    source: FileSource
    module: dict[str, StoredTensor] | None
    buffers: frozenset[str]
    groups: tuple[dict[str, Shape], ...] | None
    frozen_shapes: dict[str, Shape] | None
    frozen: dict[str, StoredTensor] | None
    shared: dict[str, str]
    fields: Fields

    @property
    def step(self) -> int | None:
        """Optimizer steps asked for so far (skipped ones included)."""
        return self.fields.integer("global_steps")

    @property
    def config(self) -> dict[str, Any]:
        """The ds_config as plain data."""
        config = self.fields.plain("ds_config")
        return config if isinstance(config, dict) else {}

    @property
    def training_dtype(self) -> str | None:
        """What training computes in, by the ds_config; None for fp32."""
        for name in ("bf16", "fp16"):
            section = self.config.get(name, self.config.get("bfloat16" if name == "bf16" else name))
            if isinstance(section, dict) and section.get("enabled"):
                return "bfloat16" if name == "bf16" else "float16"
        return None

    def client(self) -> dict[str, Any]:
        """What the training script added to the file, as plain data."""
        return {k: plain(v) for k, v in self.fields.data.items() if k not in _OWN_KEYS}


@dataclass(frozen=True, slots=True)
class OptimState:
    """A ZeRO optimizer file.

    Attributes:
        path, source: the file.
        dp, mp: rank, from the file name.
        stage: 1, 2 or 3 (BF16_Optimizer counts as 1).
        counts: partitions of each group (stage 3: one number for all).
        masters: this rank's part of each group's (stage 3: sub-group's) fp32 weights.
        states: the same for every other flat optimizer state, by name.
        steps: optimizer step of each group, None where not saved.
        gaps: padding elements behind each parameter, per group; None when there is none.
        slices: per group, parameter to (start, count) in this rank's partition; None if not saved.
        param_groups: hyper-parameters as plain data.
        fields: the optimizer_state_dict.
    """

    path: Path
    source: FileSource
    dp: int
    mp: int
    stage: int
    counts: tuple[int, ...]
    masters: tuple[StoredTensor, ...]
    states: tuple[dict[str, StoredTensor], ...]
    steps: tuple[int | None, ...]
    gaps: tuple[tuple[int, ...], ...] | None
    slices: tuple[dict[str, tuple[int, int]], ...] | None
    param_groups: tuple[dict[str, Any], ...]
    fields: Fields


def read_model(path: Path) -> ModelState:
    """Open a model-states file.

    Raises:
        FormatError: damaged, of another rank, or not such a file.
    """
    f = Fields(path, load(path).root)
    module = f.mapping("module")
    names = f.get("buffer_names")
    frozen_shapes, frozen = f.mapping("frozen_param_shapes"), f.mapping("frozen_param_fragments")
    shared = f.mapping("shared_params") or {}
    return ModelState(
        path=path,
        source=FileSource.of(path),
        module=None if module is None else f.tensors(module, "module"),
        buffers=frozenset(n for n in names if isinstance(n, str))
        if isinstance(names, (list, tuple))
        else frozenset(),
        groups=_groups(f),
        frozen_shapes=None
        if frozen_shapes is None
        else f.shapes(frozen_shapes, "frozen_param_shapes"),
        frozen=None if frozen is None else f.tensors(frozen, "frozen parameter"),
        shared={k: v for k, v in shared.items() if isinstance(k, str) and isinstance(v, str)},
        fields=f,
    )


def _groups(f: Fields) -> tuple[dict[str, Shape], ...] | None:
    value = f.get("param_shapes")
    if value is None:
        return None
    tables = [value] if isinstance(value, dict) else f.items("param_shapes")
    return tuple(f.shapes(t, f"param_shapes[{k}]") for k, t in enumerate(tables))


def read_optim(path: Path) -> OptimState:
    """Open a ZeRO optimizer file.

    Raises:
        FormatError: damaged, of another rank, or not such a file.
    """
    where = member(path.name)
    assert where is not None, f"{path} is no rank file"
    f = Fields(path, load(path).root).sub("optimizer_state_dict")
    stage = f.integer("zero_stage")
    stage = 1 if stage is None else stage
    cut3 = stage == 3
    keys = ("fp32_flat_groups",) if cut3 else ("single_partition_of_fp32_groups",)
    masters = [f.flat(t, f"{keys[0]}[{k}]") for k, t in enumerate(f.items(keys[0]))]
    states, steps, groups = _optimizer(f, stage, len(masters))
    return OptimState(
        path=path,
        source=FileSource.of(path),
        dp=where.numbers[0],
        mp=where.numbers[1],
        stage=stage,
        counts=_counts(f, 1 if cut3 else len(masters)),
        masters=tuple(masters),
        states=states,
        steps=steps,
        gaps=None if cut3 else _gaps(f),
        slices=None if cut3 else _slices(f),
        param_groups=groups,
        fields=f,
    )


def _counts(f: Fields, groups: int) -> tuple[int, ...]:
    value = plain(f.need("partition_count"))
    counts = value if isinstance(value, list) else [value] * groups
    if any(type(n) is not int or not 1 <= n < 1 << 24 for n in counts) or len(counts) < groups:
        raise f.wrong("partition_count", f"{groups} counts", value)
    return tuple(counts)


def _optimizer(
    f: Fields, stage: int, groups: int
) -> tuple[tuple[dict[str, StoredTensor], ...], tuple[int | None, ...], tuple[dict[str, Any], ...]]:
    """Return flat states, steps and hyper-parameters; all the same for each ZeRO stage."""
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    base = f.get(key)
    if isinstance(base, list):  # elastic checkpoints: one state per group, no param_groups
        table: dict[Any, Any] = dict(enumerate(base))
        settings: list[Any] = []
    elif base is None:
        table, settings = {}, []
    else:
        inner = f.sub(key)
        table, settings = inner.mapping("state") or {}, inner.get("param_groups") or []
    plain_settings = tuple(g for g in plain(settings) if isinstance(g, dict))
    states, steps = [], []
    for k in range(groups):
        state = table.get(k, {})
        if not isinstance(state, dict):
            raise f.wrong(f"{key}.state[{k}]", "a dictionary", state)
        flats = {n: t for n, t in f.tensors(state, f"{key}.state[{k}]").items() if t.shape != ()}
        states.append({n: f.flat(t, f"{key}.state[{k}].{n}") for n, t in flats.items()})
        steps.append(_step(state, f, plain_settings, k))
    return tuple(states), tuple(steps), plain_settings


def _step(
    state: Mapping[Any, Any], f: Fields, settings: tuple[dict[str, Any], ...], k: int
) -> int | None:
    """A 0-d tensor or number in the state, or (old versions) a number in the hyper-parameters."""
    group = settings[k] if k < len(settings) else {}
    for value in (state.get("step"), f.get("base_optimizer_state_step"), group.get("step")):
        number = plain(value)
        if type(number) in (int, float) and 0 <= number < 2**53:
            return int(number)
    return None


def _gaps(f: Fields) -> tuple[tuple[int, ...], ...] | None:
    value = f.plain("param_alignment_paddings")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(g, list) for g in value):
        raise f.wrong("param_alignment_paddings", "a list per group", value)
    if any(type(n) is not int or not 0 <= n < 2**20 for g in value for n in g):
        raise f.wrong("param_alignment_paddings", "counts", value)
    return tuple(tuple(g) for g in value)


def _slices(f: Fields) -> tuple[dict[str, tuple[int, int]], ...] | None:
    value = f.get("param_slice_mappings")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(g, dict) for g in value):
        raise f.wrong("param_slice_mappings", "a table per group", value)
    tables = []
    for k, group in enumerate(value):
        table: dict[str, tuple[int, int]] = {}
        for name, address in group.items():
            at = plain(address)
            if not isinstance(at, dict) or not {"start", "numel"} <= at.keys():
                raise f.wrong(f"param_slice_mappings[{k}]", "fragment addresses", address)
            table[str(name)] = (at["start"], at["numel"])
        tables.append(table)
    return tuple(tables)


def same_step(states: list[ModelState]) -> int | None:
    """Return the common step of the model files.

    Raises:
        FormatError: files of different saves lie together.
    """
    steps = {s.step for s in states}
    if len(steps) > 1:
        first = states[0]
        other = next(s for s in states if s.step != first.step)
        raise FormatError(
            f"{first.path.parent}: {first.path.name} is of step {first.step}, {other.path.name} "
            f"of step {other.step}: files of different saves are mixed"
        )
    return steps.pop() if steps else None
