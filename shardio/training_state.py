"""What an optimizer needs to go on, in one form for every writer.

Readers leave hyper-parameters as the frameworks save them; here they become groups of weight names
with settings, a step, moments and fp32 masters. What a source does not tell gets the defaults of
``torch.optim.AdamW``, and a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import counted
from . import dtypes
from .checkpoint import Checkpoint, Tensors
from .layout import Layout
from .tensor import LazyTensor

MASTER = "master"
_ADAM = {"exp_avg", "exp_avg_sq"}
_ADAMW: dict[str, Any] = {
    "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False,
    "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
    "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip
_NOT_SETTINGS = ("params", "param_names", "step")
_BUFFERS = (
    "inv_freq", "running_mean", "running_var", "num_batches_tracked", "position_ids",
    "e_score_correction_bias", "attn.masked_bias", ".expert_bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """Weights with equal hyper-parameters, in the order of the model."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """An optimizer, or the bare weights of one that starts anew.

    Attributes:
        step: updates that the moments have seen.
        groups: every trained weight is in exactly one.
        states: state name to tensors by weight; without masters.
        masters: fp32 copy of every trained weight (the weight itself where none was saved).
        frozen: weights that are not trained.
        buffers: tensors that are no parameters.
        warnings: what was not known, in plain words.
    """

    step: int
    groups: tuple[Group, ...]
    states: Mapping[str, Tensors]
    masters: Tensors
    frozen: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[str, ...]:
        """All trained weights, group by group."""
        return tuple(n for g in self.groups for n in g.names)


def training_state(ckpt: Checkpoint) -> TrainingState:
    """Return the optimizer of a checkpoint; without one, groups and masters of its weights."""
    notes: list[str] = []
    buffers = _buffers(ckpt)
    parameters = [n for n in ckpt.weights if n not in buffers]
    known = {n for tensors in ckpt.optimizer.values() for n in tensors}
    trained = [n for n in parameters if n in known] if known else parameters
    states = {s: t for s, t in ckpt.optimizer.items() if s != MASTER and t}
    masters = ckpt.optimizer.get(MASTER, {})
    return TrainingState(
        step=optimizer_step(ckpt),
        groups=_groups(ckpt, trained, states, notes),
        states=states,
        masters={n: masters.get(n, _wide(ckpt.weights[n])) for n in trained},
        frozen=tuple(n for n in parameters if n not in set(trained)),
        buffers=tuple(n for n in ckpt.weights if n in buffers),
        warnings=tuple(notes),
    )


def optimizer_step(ckpt: Checkpoint) -> int:
    """Updates that the optimizer has made: its own count, else that of the training."""
    groups = _listed(ckpt, "param_groups")
    counts = [g.get("step") for g in groups if isinstance(g, Mapping)]
    counts += _listed(ckpt, "optimizer_steps")
    found = [int(n) for n in counts if isinstance(n, (int, float)) and 0 <= n < 2**53]
    return max(found) if found else (ckpt.step or 0)


def _listed(ckpt: Checkpoint, key: str) -> list[Any]:
    """A list among the scalars; anything else there counts as nothing."""
    value = ckpt.scalars.get(key)
    return list(value) if isinstance(value, (list, tuple)) else []


def full_precision(ckpt: Checkpoint, layout: Layout) -> dict[str, LazyTensor]:
    """The weights for frameworks whose parameters are the masters: fp32 where there is a copy.

    A dtype that was asked for stays.
    """
    masters = ckpt.optimizer.get(MASTER, {}) if layout.dtype is None else {}
    return {n: masters.get(n, t) for n, t in ckpt.weights.items()}


def with_aliases(weights: Tensors, tied: Mapping[str, str]) -> dict[str, LazyTensor]:
    """The weights and their tied aliases: the very same objects, under both names."""
    found = dict(weights)
    for alias, owner in tied.items():
        if owner in found:
            found.setdefault(alias, found[owner])
    return found


def _wide(tensor: LazyTensor) -> LazyTensor:
    return tensor if tensor.dtype == dtypes.FLOAT32 else tensor.cast(dtypes.FLOAT32)


def _buffers(ckpt: Checkpoint) -> set[str]:
    named = ckpt.args.get("buffer_names")
    known = {n for n in named if isinstance(n, str)} if isinstance(named, (list, tuple)) else set()
    guessed = {
        n for n, t in ckpt.weights.items() if n.endswith(_BUFFERS) or not dtypes.is_float(t.dtype)
    }
    return (known | guessed) & set(ckpt.weights)


def _groups(
    ckpt: Checkpoint, trained: Sequence[str], states: Mapping[str, Tensors], notes: list[str]
) -> tuple[Group, ...]:
    saved = [g for g in _listed(ckpt, "param_groups") if isinstance(g, Mapping)]
    defaults = _ADAMW if set(states) >= _ADAM or not states else {}
    settings = [defaults | _settings(g) for g in saved]
    if not saved:
        if states:
            notes.append(
                "the source has no optimizer hyper-parameters (learning rate, betas...): AdamW's "
                "defaults are written; set your own after loading"
            )
        return (Group(tuple(trained), defaults),)
    named = _named(saved, set(trained))
    if named is None:
        named = _by_shape(ckpt, saved, trained)
    if named is None:
        if len(saved) > 1:
            notes.append(
                f"the source does not tell which weights its {len(saved)} parameter groups hold: "
                "written as one group with the settings of the first"
            )
        return (Group(tuple(trained), settings[0]),)
    left = [n for n in trained if not any(n in names for names in named)]
    if left:
        named[0] |= set(left)
        notes.append(
            f"{counted(len(left), 'weight is', 'weights are')} "
            "in no parameter group: put into the first one"
        )
    return tuple(
        Group(tuple(n for n in trained if n in names), found)
        for names, found in zip(named, settings, strict=True)
    )


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    found = {str(k): v for k, v in group.items() if k not in _NOT_SETTINGS}
    if isinstance(found.get("betas"), list):
        found["betas"] = tuple(found["betas"])
    return found


def _named(saved: Sequence[Mapping[str, Any]], trained: set[str]) -> list[set[str]] | None:
    """The names in each group, when the groups list names."""
    found = []
    for group in saved:
        listed = group.get("param_names") or group.get("params") or []
        if not isinstance(listed, (list, tuple)) or not all(isinstance(n, str) for n in listed):
            return None
        found.append(set(listed) & trained)
    return found if any(found) else None


def _by_shape(
    ckpt: Checkpoint, saved: Sequence[Mapping[str, Any]], trained: Sequence[str]
) -> list[set[str]] | None:
    """Megatron's two groups: no weight decay for biases and vectors, decay for the rest."""
    decays = [g.get("weight_decay") for g in saved]
    if len(saved) != 2 or (decays[0] == 0) == (decays[1] == 0):
        return None
    plain = {n for n in trained if len(ckpt.weights[n].shape) == 1 or n.endswith(".bias")}
    rest = set(trained) - plain
    return [plain if d == 0 else rest for d in decays]
