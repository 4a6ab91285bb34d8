"""What Megatron saves beside tensors: the ``args`` namespace, schedule, counters, random states.

Source: ``generate_state_dict`` and ``load_checkpoint`` in ``megatron/training/checkpointing.py``,
``opt_param_scheduler``. A source that came from Megatron keeps its settings; others get what
loading asks for, and a note on what it must be told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import dtypes
from ..checkpoint import Checkpoint
from ..pickle_write import Instance, namespace
from ..stored import is_whole
from ..training_state import TrainingState, training_state
from .divide import DIVISIBLE, Division
from .names import layer_of

VERSION = 3.0  # checkpoint_version: rows of QKV per query group
_TYPES = {"params_dtype", "main_params_dtype", "main_grads_dtype", "exp_avg_dtype"}


@dataclass(slots=True)
class Run:
    """A checkpoint seen as a Megatron run.

    Attributes:
        ckpt: canonical names, true vocabulary.
        division: how it is divided.
        training: its optimizer; None for bare weights, which load as a release.
        notes: what could not be carried, in plain words.
    """

    ckpt: Checkpoint
    division: Division
    training: TrainingState | None
    notes: list[str] = field(default_factory=list)

    @property
    def iteration(self) -> int:
        """Iterations of the training."""
        step = self.ckpt.step
        if step is not None:
            return step
        return self.training.step if self.training else 0

    @property
    def folder(self) -> str:
        """``release`` makes Megatron start anew from the weights."""
        return f"iter_{self.iteration:07d}" if self.training else "release"

    @property
    def tracker(self) -> str:
        """Content of ``latest_checkpointed_iteration.txt``."""
        return str(self.iteration) if self.training else "release"

    @property
    def distributed(self) -> bool:
        """The optimizer is Megatron's distributed one (ZeRO-1)."""
        return self.division.layout.zero_stage > 0


def run_of(ckpt: Checkpoint, division: Division) -> Run:
    """Look at a checkpoint as at a Megatron run."""
    run = Run(ckpt, division, training_state(ckpt) if ckpt.optimizer else None)
    if run.training:
        run.notes += run.training.warnings
        run.notes.append(
            "random states start anew from the seed (the old ones belong to their ranks); the "
            "place in the training data is the source's own count of samples, if it had one"
        )
        if bool(division.args.get("use_distributed_optimizer")) != run.distributed:
            kind = "the distributed" if run.distributed else "a plain"
            flag = "with" if run.distributed else "without (or reshard with --zero-stage 1)"
            run.notes.append(
                f"written for {kind} optimizer: train {flag} --use-distributed-optimizer"
            )
    return run


def model_dtype(division: Division) -> np.dtype:
    """The element type that most weights have."""
    counts: Counter[str] = Counter()
    for tensor in division.weights.values():
        if dtypes.is_float(tensor.dtype):
            counts[dtypes.name(tensor.dtype)] += tensor.size
    return dtypes.parse(counts.most_common(1)[0][0])


def saved_args(run: Run, rank: int, ckpt_format: str) -> Instance:
    """The settings, as an ``argparse.Namespace``, of one rank."""
    division = run.division
    layout, dtype = division.layout, model_dtype(division)
    args = {k: v for k, v in division.args.items() if is_whole(v)}
    world = division.stage_size * division.stages.pp
    args |= _structure(division) | division.stages.settings()
    args |= {
        "tensor_model_parallel_size": layout.tp,
        "transformer_pipeline_model_parallel_size": division.stages.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": division.etp,
        "context_parallel_size": layout.cp,
        "data_parallel_size": division.stage_size // (layout.tp * layout.cp),
        "use_tp_pp_dp_mapping": False,
        "world_size": world,
        "rank": rank,
        "iteration": run.iteration,
        "padded_vocab_size": division.padded,
        "make_vocab_size_divisible_by": layout.make_vocab_divisible_by
        or args.get("make_vocab_size_divisible_by")
        or DIVISIBLE,
        "params_dtype": dtype,
        "bf16": dtype == dtypes.BFLOAT16,
        "fp16": dtype == dtypes.FLOAT16,
        "ckpt_format": ckpt_format,
        "use_dist_ckpt": ckpt_format == "torch_dist",
        "use_distributed_optimizer": run.distributed,
        "no_save_optim": run.training is None,
        "no_save_rng": run.training is None or ckpt_format == "torch_dist",
    }
    for key in _TYPES & set(args):
        if isinstance(args[key], str):
            args[key] = dtypes.parse(args[key])
    if args.get("layernorm_epsilon") is not None:  # the name of newer releases
        args.setdefault("norm_epsilon", args["layernorm_epsilon"])
    defaults = {
        "seq_length": args.get("max_position_embeddings"),
        "tokenizer_type": "HuggingFaceTokenizer",
        "add_position_embedding": True,
        "sequence_parallel": False,  # Megatron's own converter asks for these two
        "apply_query_key_layer_scaling": False,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
    }
    return namespace(defaults | args)


def _structure(division: Division) -> dict[str, Any]:
    """Sizes that the tensors themselves tell."""
    weights = division.weights
    moe = division.spelling.moe
    layers = division.spelling.layers
    found: dict[str, Any] = {
        "num_layers": layers,
        "encoder_num_layers": layers,
        "num_experts": division.experts or None,
        "untie_embeddings_and_output_weights": not division.tied,
        "moe_layer_freq": 1 if len(moe) in (0, layers) else [int(i in moe) for i in range(layers)],
        "mtp_num_layers": None,
    }
    for name, tensor in weights.items():
        if not name.endswith("linear_fc2.weight") or layer_of(name) is None:
            continue
        if ".experts." in name:
            found["moe_ffn_hidden_size"] = tensor.shape[1]
        elif ".shared_experts." in name:
            found["moe_shared_expert_intermediate_size"] = tensor.shape[1]
        else:
            found["ffn_hidden_size"] = tensor.shape[1]
    if "ffn_hidden_size" not in found and "moe_ffn_hidden_size" in found:
        found["ffn_hidden_size"] = division.args.get(
            "ffn_hidden_size", found["moe_ffn_hidden_size"]
        )
    return found


def counters(run: Run) -> dict[str, Any]:
    """Entries that every format has."""
    found: dict[str, Any] = {"checkpoint_version": VERSION, "iteration": run.iteration}
    if run.training:
        found["opt_param_scheduler"] = _schedule(run, run.training)
    found["num_floating_point_operations_so_far"] = 0
    return found


def _schedule(run: Run, training: TrainingState) -> dict[str, Any]:
    """``OptimizerParamScheduler.state_dict()``; made up where the source is no Megatron run."""
    saved = run.ckpt.scalars.get("opt_param_scheduler")
    if isinstance(saved, Mapping) and is_whole(saved):
        return dict(saved)
    run.notes.append(
        "the source has no Megatron learning-rate schedule: train with "
        "--override-opt-param-scheduler"
    )
    settings = training.groups[0].settings if training.groups else {}
    rate = settings.get("initial_lr", settings.get("lr", 0.0))
    decay = max((g.settings.get("weight_decay", 0.0) for g in training.groups), default=0.0)
    batch = run.division.args.get("global_batch_size") or 1
    return {
        "max_lr": rate,
        "lr_warmup_steps": 0,
        "num_steps": run.iteration * batch,
        "lr_decay_style": "constant",
        "lr_decay_steps": max(1, run.iteration * batch),
        "min_lr": 0.0,
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": max(1, run.iteration * batch),
    }
