"""What DeepSpeed's rank files say besides tensors: counters, config, loss scaler, schedules.

Keys follow ``engine.py`` (``_common_checkpoint_state``), ``stage_1_and_2.py`` and ``stage3.py`` of
DeepSpeed 0.19.8; older versions ignore those they do not know. What the source does not tell is
filled so that ``load_checkpoint`` resumes, and said in a warning.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import dtypes
from ..checkpoint import Checkpoint
from ..layout import Layout
from ..pickle_write import Instance, Name
from ..stored import is_whole
from ..training_state import TrainingState, training_state

VERSION = "0.19.8"  # whose files these are
SUB_GROUP = 1_000_000_000  # DeepSpeed's default sub_group_size
_SCALER = "deepspeed.runtime.fp16.loss_scaler"
_DYNAMIC = {
    "cur_scale": 65536.0, "dynamic": True, "cur_iter": 0, "last_overflow_iter": -1,
    "scale_factor": 2.0, "scale_window": 1000, "min_scale": 1, "delayed_shift": 2,
    "cur_hysteresis": 2, "consecutive_hysteresis": False, "raise_error_at_min_scale": True,
}  # fmt: skip


@dataclass(slots=True)
class Source:
    """A checkpoint seen as DeepSpeed training.

    Attributes:
        ckpt: in the model's names.
        training: its optimizer.
        dtype: element type that training computes in.
        config: the ds_config to be written.
        notes: what could not be carried, in plain words.
        mp: number of the model-parallel rank that this is a part for (stage * tp + tensor rank).
        pp, tp: model-parallel sizes.
        rules: ``universal_checkpoint_info``, how parameters are cut.
    """

    ckpt: Checkpoint
    training: TrainingState
    dtype: np.dtype
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    mp: int = 0
    pp: int = 1
    tp: int = 1
    rules: Mapping[str, Any] | None = None

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def step(self) -> int:
        """Steps of the training, skipped ones included."""
        return self.ckpt.step if self.ckpt.step is not None else self.training.step

    @property
    def tag(self) -> str:
        """DeepSpeed's default folder name."""
        return f"global_step{self.step}"


def source_of(ckpt: Checkpoint, layout: Layout, stage: int) -> Source:
    """Return what both DeepSpeed writers need."""
    training = training_state(ckpt)
    dtype = _training_dtype(ckpt, layout, training)
    notes = list(training.warnings)
    config = _config(ckpt, stage, dtype, notes)
    return Source(ckpt, training, dtype, config, notes)


def model_state(source: Source, module: Mapping[str, Any] | None, dp: int) -> dict[str, Any]:
    """The content of a model-states file, without shapes and frozen parameters.

    Args:
        source: the part of the rank.
        module: its weights; None where they are in layer files.
        dp: data-parallel ranks.
    """
    ckpt, step = source.ckpt, source.step
    samples = ckpt.args.get("global_samples")
    state: dict[str, Any] = {
        "module": None if module is None else OrderedDict(module),
        "buffer_names": list(source.training.buffers),
        "optimizer": None,
        "shared_params": {a: o for a, o in ckpt.tied.items() if o in ckpt.weights},
        "lr_scheduler": _schedule(source),
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": ckpt.args.get("skipped_steps") or 0,
        "global_steps": step,
        "dp_world_size": dp,
        "mp_world_size": source.pp * source.tp,
        "checkpoint_parallel_dimensions": {"pp_degree": source.pp, "tp_degree": source.tp},
        "ds_config": source.config,
        "ds_version": VERSION,
    }
    if isinstance(samples, int):  # else DeepSpeed computes it from its own batch size
        state["global_samples"] = samples
    if source.rules:
        state["universal_checkpoint_info"] = dict(source.rules)
    return state | _client_state(source, set(state))


def optimizer_head(source: Source) -> dict[str, Any]:
    """The entries that every ZeRO stage's optimizer state starts with."""
    scaler = _loss_scaler(source)
    head = {
        "loss_scaler": scaler,
        "dynamic_loss_scale": scaler.state["dynamic"],
        "overflow": False,
        "ds_version": VERSION,
    }
    clip = source.ckpt.scalars.get("clip_grad", source.config.get("gradient_clipping"))
    if source.rules:
        head["universal_checkpoint_info"] = dict(source.rules)
    # loading overrides the engine's own setting, so an unknown one is left out
    return head | ({"clip_grad": clip} if isinstance(clip, (int, float)) else {})


def _training_dtype(ckpt: Checkpoint, layout: Layout, training: TrainingState) -> np.dtype:
    """What was asked for, else what the source trained in, else what its weights are."""
    if layout.dtype is not None:
        return dtypes.parse(layout.dtype)
    known = ckpt.args.get("training_dtype")
    if isinstance(known, str):
        return dtypes.parse(known)
    sizes: Counter[np.dtype] = Counter()
    for name in training.trained or ckpt.weights:
        sizes[ckpt.weights[name].dtype] += ckpt.weights[name].size
    common = sizes.most_common(1)[0][0] if sizes else dtypes.FLOAT32
    return common if common in (dtypes.BFLOAT16, dtypes.FLOAT16) else dtypes.FLOAT32


def _config(ckpt: Checkpoint, stage: int, dtype: np.dtype, notes: list[str]) -> dict[str, Any]:
    """The source's ds_config with the stage and precision of what is written."""
    saved = ckpt.args.get("ds_config")
    config = {k: v for k, v in saved.items() if is_whole(v)} if isinstance(saved, Mapping) else {}
    old = config.get("zero_optimization")
    zero: dict[str, Any] = {"stage": stage}
    if isinstance(old, Mapping):
        if isinstance(old.get("sub_group_size"), (int, float)):
            zero["sub_group_size"] = old["sub_group_size"]
        for key in ("round_robin_gradients", "parameter_alignment", "mics_shard_size"):
            if old.get(key):
                notes.append(f"written without {key}: switch it off in the config to load this")
    for key in ("bf16", "bfloat16", "fp16"):
        config.pop(key, None)
    config["zero_optimization"] = zero
    if dtype != dtypes.FLOAT32:
        config["bf16" if dtype == dtypes.BFLOAT16 else "fp16"] = {"enabled": True}
    return config


def _schedule(source: Source) -> dict[str, Any]:
    saved = source.ckpt.scalars.get("lr_scheduler")
    if isinstance(saved, Mapping) and saved and is_whole(saved):
        return dict(saved)
    if source.step and source.training.states:
        source.note(
            "the source has no learning-rate schedule: one of DeepSpeed's own starts after the "
            f"written step ({source.step}), others must be set by the training script"
        )
    return {"last_batch_iteration": source.step - 1}


def _client_state(source: Source, taken: set[str]) -> dict[str, Any]:
    """What the training script had saved; random states belong to the old ranks."""
    saved = source.ckpt.args.get("client_state")
    if not isinstance(saved, Mapping):
        return {}
    kept = {k: v for k, v in saved.items() if isinstance(k, str) and is_whole(v) and k not in taken}
    lost = sorted(str(k) for k in saved if k not in kept)
    if lost:
        source.note(
            f"client state that is not plain data is left out (random states?): {', '.join(lost)}"
        )
    return kept


def _loss_scaler(source: Source) -> Instance:
    if source.dtype != dtypes.FLOAT16:
        return Instance(Name(_SCALER, "LossScaler"), {"cur_scale": 1.0, "dynamic": False})
    saved = source.ckpt.scalars.get("loss_scaler")
    known = dict(saved) if isinstance(saved, Mapping) else {}
    if known.get("dynamic") is False:
        state = {"cur_scale": known.get("cur_scale", 1.0), "dynamic": False}
        return Instance(Name(_SCALER, "LossScaler"), state)
    if not known:
        source.note("the source has no fp16 loss scale: it starts at 65536 again")
    state = {key: known.get(key, default) for key, default in _DYNAMIC.items()}
    return Instance(Name(_SCALER, "DynamicLossScaler"), state | {"dtype": dtypes.FLOAT16})
