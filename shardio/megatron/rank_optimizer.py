"""Megatron's optimizer as one rank saves it: plain (with fp32 copies) or distributed (ZeRO-1).

The inverse of ``optimizer``. Source: ``megatron/core/optimizer/{__init__,optimizer,
distrib_optimizer}.py``. Parameters are numbered group by group, decayed ones first; with expert
parallelism routed experts have an optimizer of their own, which makes a list of two. The
distributed optimizer's file holds flat fp32 buffers, gathered over data parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import UnsupportedError, counted
from .. import dtypes
from ..box import Index
from ..chunked import zeros
from ..tensor import LazyTensor
from ..torchzip_plan import Vector
from ..training_state import MASTER, TrainingState
from .buffers import Param, buffers_of, spans_of
from .divide import Division, Place, pad_vocabulary
from .names import canonical, is_expert, is_parameter
from .run_state import Run, model_dtype

_FLAT = {"param": MASTER, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_NOT_OURS = ("params", "param_names", "step", "initial_lr")

Kind = tuple[bool, bool]  # (expert, not decayed): sorts as Megatron orders optimizers and groups
States = Mapping[str, Mapping[str, LazyTensor]]
Chunks = Sequence[Mapping[str, LazyTensor]]  # weights of a rank, by saved name


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter of a rank: ``chunk/saved name``, and what its group depends on."""

    param: Param
    kind: Kind


@dataclass(frozen=True, slots=True)
class OptimizerPlan:
    """The optimizer of a whole run.

    Attributes:
        division: how the model is divided.
        training: settings and step.
        states: state name (with ``master``) to whole tensors, vocabulary padded.
        kinds: parameter groups that some rank has, per optimizer.
        fused: steps are counted per group (Transformer Engine's Adam), not per parameter.
        single: training is in fp32, without fp32 copies.
    """

    division: Division
    training: TrainingState
    states: States
    kinds: tuple[tuple[Kind, ...], ...]
    fused: bool
    single: bool

    def slots(self, chunks: Chunks) -> list[Slot]:
        """The parameters of a rank that holds these weights, in the order of its modules."""
        return [
            Slot(
                Param(f"{c}/{name}", tensor.shape, tensor.dtype, c, kind[0]),
                kind,
            )
            for c, chunk in enumerate(chunks)
            for name, tensor in chunk.items()
            if is_parameter(name)
            for kind in (kind_of(self.division, canonical(name), tensor.shape),)
        ]

    def held(self, place: Place) -> dict[str, dict[str, LazyTensor]]:
        """State name to ``chunk/saved name`` to what the rank holds of it."""
        return {
            state: {
                f"{c}/{name}": tensor
                for c in range(self.division.stages.vpp)
                for name, tensor in self.division.chunk(place, c, tensors).items()
            }
            for state, tensors in self.states.items()
        }

    def group(self, kind: Kind, *, counts: bool = True) -> dict[str, Any]:
        """Settings of a parameter group, without its parameters; ``counts`` is whether it holds the
        step, which torch's own Adam keeps elsewhere.
        """
        expert, bare = kind
        groups = self.training.groups
        found = [g for g in groups if (not g.settings.get("weight_decay")) == bare] or groups
        settings = {k: v for k, v in found[0].settings.items() if k not in _NOT_OURS}
        if bare:
            settings["weight_decay"] = 0.0
        rate = settings.get("lr", 0.0)
        return {
            "lr_mult": 1.0,
            "is_decoupled_lr": False,
            "default_config": True,
            "max_lr": rate,
            "min_lr": rate,
            **settings,
            "wd_mult": 0.0 if bare else 1.0,
            "is_expert_parallel": expert,
            **({"step": self.training.step} if counts else {}),
        }


def kind_of(division: Division, name: str, shape: Index) -> Kind:
    """The parameter group of a canonical name: no decay for biases and one-dimensional weights."""
    expert = is_expert(name) and division.layout.ep > 1
    norm = name.endswith((".q_layernorm.weight", ".k_layernorm.weight"))
    decays = len(shape) > 1 and not name.endswith(".bias")
    decays |= norm and bool(division.args.get("apply_wd_to_qk_layernorm"))
    return expert, not decays


def optimizer_plan(run: Run) -> OptimizerPlan:
    """Prepare the optimizer of a run that has one.

    Raises:
        UnsupportedError: a distributed optimizer of something else than Adam.
    """
    division, training = run.division, run.training
    assert training is not None, "asked for the optimizer of bare weights"
    masters = dict(training.masters)
    bare = {n: t for n, t in run.ckpt.weights.items() if is_parameter(n) and n not in masters}
    if bare:
        run.notes.append(
            f"{counted(len(bare), 'weight has', 'weights have')} "
            "no optimizer states (frozen?): Megatron will train them, "
            f"from zero moments: {', '.join([*bare][:3])}"
        )
    masters = masters | {n: t.cast(dtypes.FLOAT32) for n, t in bare.items()}
    empty = {n: zeros(t.shape, dtypes.FLOAT32) for n, t in bare.items()}
    moments = {state: {**empty, **tensors} for state, tensors in training.states.items()}
    states = {MASTER: masters, **moments}
    missing = [s for s in _FLAT.values() if s not in states]
    if run.distributed and missing:
        raise UnsupportedError(
            "Megatron's distributed optimizer keeps Adam's moments; the source has no "
            f"{', '.join(missing)}: use --zero-stage 0"
        )
    kinds = sorted(
        {kind_of(division, n, t.shape) for n, t in division.weights.items() if is_parameter(n)}
    )
    chained = tuple(tuple(k for k in kinds if k[0] == e) for e in (False, True))
    _note_settings(run, training)
    return OptimizerPlan(
        division,
        training,
        {state: pad_vocabulary(tensors, division.padded) for state, tensors in states.items()},
        tuple(c for c in chained if c),
        fused=division.spelling.engine,
        single=model_dtype(division) == dtypes.FLOAT32,
    )


def _note_settings(run: Run, training: TrainingState) -> None:
    decays = {g.settings.get("weight_decay", 0.0) for g in training.groups}
    if len({g.settings.get("lr") for g in training.groups}) > 1:
        run.notes.append("parameter groups of several learning rates: Megatron gets the first one")
    flat = [n for n in training.trained if len(run.ckpt.weights[n].shape) == 1]
    if flat and 0 not in decays:
        run.notes.append(
            "the source decays biases and norms, too, which Megatron by default does not: their "
            "weight decay ends"
        )


# -- the plain optimizer --------------------------------------------------------------------------


def plain_optimizer(plan: OptimizerPlan, place: Place, chunks: Chunks) -> Any:
    """``optimizer.state_dict()`` of a rank: a dict, or a list of the dense one and the experts'."""
    slots, held = plan.slots(chunks), plan.held(place)
    parts = [_plain(plan, kinds, slots, held) for kinds in plan.kinds]
    return parts[0] if len(parts) == 1 else parts


def _plain(
    plan: OptimizerPlan, kinds: Sequence[Kind], slots: Sequence[Slot], held: States
) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    mains: list[list[LazyTensor]] = []
    for kind in kinds:
        own = [s.param.name for s in slots if s.kind == kind]
        first = sum(len(g["params"]) for g in groups)
        group = plan.group(kind, counts=plan.fused)
        groups.append({**group, "params": list(range(first, first + len(own)))})
        mains.append([held[MASTER][name] for name in own])
        for number, name in enumerate(own, first):
            found = {s: t[name] for s, t in held.items() if s != MASTER and name in t}
            if found:
                state[number] = {**({} if plan.fused else _step(plan)), **found}
    inner = {"state": state, "param_groups": groups}
    return inner if plan.single else {"optimizer": inner, "fp32_from_fp16_params": mains}


def _step(plan: OptimizerPlan) -> dict[str, Any]:
    return {"step": np.array(plan.training.step, np.float32)}


# -- the distributed optimizer --------------------------------------------------------------------


def group_settings(plan: OptimizerPlan) -> Any:
    """``state_dict()`` of the distributed optimizer: settings alone."""
    parts = [
        {"optimizer": {"param_groups": [plan.group(kind) for kind in kinds]}}
        for kinds in plan.kinds
    ]
    return parts[0] if len(parts) == 1 else parts


def flat_buffers(plan: OptimizerPlan, place: Place, chunks: Chunks) -> Any:
    """The content of ``distrib_optim.pt`` of a rank."""
    slots, held = plan.slots(chunks), plan.held(place)
    parts = [
        dict(_sections([s.param for s in slots if s.kind in kinds], held)) for kinds in plan.kinds
    ]
    return parts[0] if len(parts) == 1 else parts


def _sections(params: Sequence[Param], held: States) -> Iterator[tuple[Any, Any]]:
    yield "buckets_coalesced", True
    for index, buffer in enumerate(buffers_of(params)):
        spans = list(spans_of(buffer))
        size = spans[-1][2]
        content: dict[str, Any] = {}
        for key, state in _FLAT.items():
            here = [
                (start, held[state][p.name].cast(dtypes.FLOAT32))
                for p, start, _ in spans
                if p.name in held[state]
            ]
            pieces = tuple((start, (tensor, 0, tensor.size)) for start, tensor in here)
            content[key] = Vector(dtypes.FLOAT32, size, pieces)
        content["numel_unpadded"] = size
        yield index, {(buffer[0].dtype, dtypes.FLOAT32): content}
