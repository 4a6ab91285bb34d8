"""``--to nanotron``: a checkpoint folder of nanotron, ``<step>/`` and ``latest.txt``.

One safetensors file per tensor and rank with its place in the metadata, an optimizer file per rank
(per data-parallel rank as well with ``--zero-stage 1``), a schedule file per optimizer file, and
``checkpoint_metadata.json``. ``config.yaml`` is the training script's own. Source: nanotron
``serialize/{weights,optimizer,metadata}.py`` and ``optim/{zero,named_optimizer}.py``, version 1.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ...errors import LayoutError
from ..checkpoint import Checkpoint
from ..chunked import zeros
from ..dtypes import FLOAT32
from ..layout import Layout
from ..nanotron_cut import EMBEDDING, HEAD, Grid, divide
from ..payload import BytesPayload, TensorPayload
from ..safetensors_header import build_header
from ..safetensors_plan import plan_bytes, plan_json
from ..stream import OutFile
from ..tensor import LazyTensor, concat
from ..torchzip_plan import Vector, plan_torch_file
from ..training_state import TrainingState, training_state
from . import Planned, Writer
from ._common import assets, only_axes

_VERSION = "1.5"


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the folder.

    Raises:
        LayoutError: other axes, or sizes that do not divide the model.
        UnsupportedError: tensors that nanotron's models do not have.
    """
    only_axes(layout, "tp", "pp", "dp", "zero_stage")
    if layout.zero_stage > 1:
        raise LayoutError(f"zero_stage={layout.zero_stage}: nanotron has ZeRO-1, or 0 for none")
    training = training_state(ckpt) if ckpt.optimizer else None
    step = ckpt.step if ckpt.step is not None else training.step if training else 0
    rows = _padded(ckpt, layout)
    args = {**ckpt.args, "vocab_size": rows, "tie_word_embeddings": HEAD not in ckpt.weights}
    weights = {n: _widened(n, t, rows) for n, t in ckpt.weights.items()}
    tied = HEAD not in weights
    grid = divide(weights, args, layout, tied)
    notes: list[str] = []
    files = list(_weights(grid, weights))
    if training:
        notes += training.warnings
        files += _Optimizers(grid, training, layout, step, rows, weights).files()
        notes.append(
            "samples seen and the data's position are not carried: data starts from its beginning"
        )
    files.append(plan_json("model_config.json", args))
    files.append(plan_json("checkpoint_metadata.json", _metadata(layout, step, args)))
    placed = [OutFile(f"{step}/{f.name}", f.size, f.parts) for f in files]
    return Planned((*placed, plan_bytes("latest.txt", str(step).encode()), *assets(ckpt)),
                   tuple(notes))  # fmt: skip


def _padded(ckpt: Checkpoint, layout: Layout) -> int:
    """Rows of the vocabulary: nanotron's loader wants a multiple of tp."""
    rows = ckpt.weights[EMBEDDING].shape[0]
    unit = (layout.make_vocab_divisible_by or 1) * layout.tp
    return -(-rows // unit) * unit


def _widened(name: str, tensor: LazyTensor, rows: int) -> LazyTensor:
    """The tensor, with rows of zeros where it has one per token."""
    if name not in (EMBEDDING, HEAD) or tensor.shape[0] == rows:
        return tensor
    return concat([tensor, zeros((rows - tensor.shape[0], *tensor.shape[1:]), tensor.dtype)])


def _metadata(layout: Layout, step: int, args: dict[str, Any]) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "name": "resharded",
        "start_training_step": 1,
        "consumed_train_samples": 0,
        "consumed_tokens_per_dataset_folder": {},
        "sequence_length": args.get("max_position_embeddings"),
    }
    metas = {
        "consumed_train_samples": 0,
        "consumed_tokens_total": 0,
        "last_train_step": step,
        "last_stage_idx": 0,
        "data_stages": [stage],
    }
    sizes = {"tp": layout.tp, "dp": layout.dp, "cp": 1}
    return {**sizes, "custom_metas": None, "metas": metas, "version": _VERSION}


def _weights(grid: Grid, weights: dict[str, LazyTensor]) -> Iterator[OutFile]:
    for name in grid.stages:
        for rank in range(grid.tp if name in grid.cuts else 1):
            part = grid.cut(name, weights[name], rank)
            metadata = grid.metadata(name, weights[name].shape, rank)
            header, (start,) = build_header([("data", part.dtype, part.shape)], metadata)
            parts = ((0, BytesPayload(header)), (start, TensorPayload(part)))
            yield OutFile(grid.file(name, rank), start + part.nbytes, parts)


@dataclass(frozen=True, slots=True)
class _Optimizers:
    """The optimizer files of all ranks."""

    grid: Grid
    training: TrainingState
    layout: Layout
    step: int
    rows: int
    weights: dict[str, LazyTensor]

    def files(self) -> Iterator[OutFile]:
        yield plan_json("optimizer/optimizer_config.json", self._config())
        for stage in range(self.grid.pp):
            for rank in range(self.grid.tp):
                for dp in range(self.layout.dp) if self._zero else (None,):
                    mark = f"_pp-{stage}-of-{self.grid.pp}"
                    mark += "" if dp is None else f"_dp-{dp}-of-{self.layout.dp}"
                    mark += f"_tp-{rank}-of-{self.grid.tp}_exp-0-of-1.pt"
                    state = self._state(stage, rank, dp)
                    yield plan_torch_file(f"optimizer/optimizer{mark}", state)
                    yield plan_torch_file(f"lr_scheduler/lr_scheduler{mark}", self._schedule())

    @property
    def _zero(self) -> bool:
        return self.layout.zero_stage == 1

    @property
    def _mixed(self) -> bool:
        """Whether weights are 16-bit beside fp32 masters, which a gradient accumulator keeps."""
        return any(self.weights[n].dtype != FLOAT32 for n in self.training.trained)

    def _local(self, name: str, tensors: Any, rank: int) -> LazyTensor:
        return self.grid.cut(name, _widened(name, tensors[name], self.rows), rank)

    def _range(self, count: int, dp: int) -> tuple[int, int]:
        """A data-parallel rank's part of a flattened parameter: the last ranks have one less."""
        world = self.layout.dp
        size = -(-count // world)
        short = size * world - count
        first = dp * size - max(0, dp - (world - short))
        return first, first + size - (dp >= world - short)

    def _state(self, stage: int, rank: int, dp: int | None) -> dict[str, Any]:
        held = set(self.grid.held(stage))
        order = [n for n in self.grid.held(stage) if n in set(self.training.trained)]
        table: dict[int, dict[str, Any]] = {}
        names: dict[int, str] = {}
        groups: list[dict[str, Any]] = []
        masters: dict[str, Any] = {}
        for group in self.training.groups:
            members = set(group.names) & held
            numbers = []
            for name in (n for n in order if n in members):
                part = self._cutter(name, rank, dp)
                if part is None:
                    continue
                number = len(names)
                numbers.append(number)
                names[number] = name
                states = {s: t for s, t in self.training.states.items() if name in t}
                moments = {s: part(t) for s, t in states.items()}
                table[number] = {"step": np.array(self.training.step, np.float32), **moments}
                masters[name] = part(self.training.masters)
            groups.append({**group.settings, "params": numbers})
        found: dict[str, Any] = {"state": table, "param_groups": groups, "names": names}
        return found | ({"gradient_accumulator": masters} if self._mixed else {})

    def _cutter(self, name: str, rank: int, dp: int | None) -> Any:
        """What a rank holds of a parameter's state; None where it holds nothing."""
        if dp is None:
            return lambda tensors: self._local(name, tensors, rank)
        count = prod(self.grid.cut(name, self.weights[name], rank).shape)
        lo, hi = self._range(count, dp)
        if lo == hi:
            return None

        def part(tensors: Any) -> Vector:
            local = self._local(name, tensors, rank)
            return Vector(local.dtype, hi - lo, ((0, (local, lo, hi)),))

        return part

    def _schedule(self) -> dict[str, Any]:
        """``LambdaLR.state_dict()``: the lambdas themselves are the script's."""
        rates = [float(g.settings.get("lr", 0.0)) for g in self.training.groups]
        base = [float(g.settings.get("initial_lr", r))
                for g, r in zip(self.training.groups, rates, strict=True)]  # fmt: skip
        return {
            "base_lrs": base,
            "last_epoch": self.step,
            "_step_count": self.step + 1,
            "_last_lr": rates,
            "lr_lambdas": [None] * len(rates),
        }

    def _config(self) -> dict[str, Any]:
        plain = "OptimizerFromGradientAccumulator" if self._mixed else "NamedOptimizer"
        sizes = {"tp": self.grid.tp, "dp": self.layout.dp, "pp": self.grid.pp}
        parallel = {f"{k}_size": str(v) for k, v in sizes.items()} | {"expert_parallel_size": "1"}
        configs: dict[str, Any] = {}
        if self._zero:
            local = {n: self.grid.cut(n, self.weights[n], 0).shape for n in self.training.trained}
            configs["param_name_to_dp_rank_offsets"] = {
                n: {
                    str(dp): [str(lo), str(hi)]
                    for dp in range(self.layout.dp)
                    for lo, hi in [self._range(prod(shape), dp)]
                    if lo < hi
                }
                for n, shape in local.items()
            }
            configs["orig_param_shapes"] = {n: [str(k) for k in s] for n, s in local.items()}
        kind = "ZeroDistributedOptimizer" if self._zero else plain
        return {"type": kind, "parallelism": parallel, "configs": configs}


WRITER = Writer("nanotron", "nanotron", "nanotron", plan)
