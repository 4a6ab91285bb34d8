"""The sections of a run's TOML file, one frozen dataclass each (``[model]``: ``model_config.py``).

Every value that can be wrong on its own is refused here; what only a number of processes shows is
refused by ``degrees.py``. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, did_you_mean

#: Schedules that compute gradients of inputs and of weights apart.
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")

#: Pipeline schedules of ``torch.distributed.pipelining``, and how many stages a rank has in each.
SCHEDULES = {
    "GPipe": 1,
    "1F1B": 1,
    "Interleaved1F1B": 2,
    "LoopedBFS": 2,
    "InterleavedZeroBubble": 2,
    "ZBVZeroBubble": 2,
    "DualPipeV": 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the processes share the work. The product of the degrees is the number of processes.

    Attributes:
        dp_replicate: copies of the sharded model (HSDP when ``dp_shard`` > 1).
        dp_shard: ranks over which a copy is sharded; 0 takes what the other degrees leave.
        zero: what data parallel ranks share: 0 nothing (DDP), 1 optimizer states, 2 also gradients,
            3 also parameters.
        tp: tensor parallel ranks.
        sp: between the tensor parallel blocks the sequence is sharded over ``tp``.
        loss_parallel: the loss is computed on logits sharded over the vocabulary.
        pp: pipeline ranks.
        schedule: one of ``SCHEDULES``.
        microbatches: of the pipeline, per step; 0 follows ``train.micro_batch``.
        cp: ranks that share each sequence.
        ep: ranks that share each layer's experts, taken from ``dp_shard``.
        cpu_offload: parameters, gradients and optimizer states lie in CPU memory.
    """

    dp_replicate: int = 1
    dp_shard: int = 0
    zero: int = 3
    tp: int = 1
    sp: bool = False
    loss_parallel: bool = False
    pp: int = 1
    schedule: str = "1F1B"
    microbatches: int = 0
    cp: int = 1
    ep: int = 1
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "tp", "pp", "cp", "ep"):
            _at_least(f"parallel.{name}", getattr(self, name), 1)
        for name in ("dp_shard", "microbatches"):
            _at_least(f"parallel.{name}", getattr(self, name), 0)
        _one_of("parallel.schedule", self.schedule, tuple(SCHEDULES))
        if self.zero not in range(4):
            raise ConfigError(f"parallel.zero must be 0, 1, 2 or 3, not {self.zero}")
        if self.cpu_offload and self.zero < 2:
            raise ConfigError("parallel.cpu_offload needs parallel.zero 2 or 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and on how much.

    Attributes:
        steps: optimizer steps.
        seq_len: tokens per sequence.
        batch: sequences per step, over all ranks and micro-batches.
        micro_batch: sequences that a rank computes at once; 0 for all of its part.
        dtype: of the parameters: float32, bfloat16 or float64.
        precision: of the arithmetic: ``full`` (that of ``dtype``), ``bf16`` or ``fp16`` (mixed).
        seed: of the initial weights and of the order of the data.
        clip: largest gradient norm; 0 never clips.
        threads: CPU threads per rank; 0 shares the machine's cores among the ranks.
        checkpointing: activations recomputed in backward: ``none``, ``selective`` (all but
            attention and every other matrix product) or ``full``.
        compile: compile each layer.
        device: ``cpu``, ``cuda``, or ``auto``: CUDA where there is one.
    """

    steps: int
    seq_len: int
    batch: int
    micro_batch: int = 0
    dtype: str = "float32"
    precision: str = "full"
    seed: int = 0
    clip: float = 1.0
    threads: int = 0
    checkpointing: str = "none"
    compile: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "batch"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("threads", "micro_batch"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        _one_of("train.dtype", self.dtype, ("float32", "bfloat16", "float64"))
        _one_of("train.precision", self.precision, ("full", "bf16", "fp16"))
        _one_of("train.checkpointing", self.checkpointing, ("none", "selective", "full"))
        _one_of("train.device", self.device, ("auto", "cpu", "cuda"))
        if self.precision != "full" and self.dtype != "float32":
            raise ConfigError(
                f"train.precision={self.precision!r} keeps float32 parameters; remove train.dtype="
                f"{self.dtype!r}, or use precision 'full'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW, or Muon for the matrices inside layers and AdamW for the rest.

    Attributes:
        lr: peak learning rate of AdamW.
        weight_decay: of matrices only.
        muon_lr, muon_momentum: of Muon, whose updates are scaled to the size of AdamW's.
        fused: one kernel for all parameters.
    """

    lr: float
    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    muon_lr: float = 0.0
    muon_momentum: float = 0.95
    fused: bool = True

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, ("adamw", "muon"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps, as a factor of its peak.

    Attributes:
        kind: ``cosine``, ``linear``, ``constant`` or ``wsd`` (warm up, stable, decay).
        warmup: steps of linear rise.
        decay: last steps of ``wsd``, over which it falls with 1 - sqrt; 0 for a tenth of all.
        floor: where it ends, as a factor.
    """

    kind: str = "cosine"
    warmup: int = 0
    decay: int = 0
    floor: float = 0.1

    def __post_init__(self) -> None:
        _one_of("schedule.kind", self.kind, ("cosine", "linear", "constant", "wsd"))
        for name in ("warmup", "decay"):
            _at_least(f"schedule.{name}", getattr(self, name), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is trained on.

    Attributes:
        tokens: a token file, a folder of ``mconv tokenize``, or text (``.txt``, ``.jsonl``, ...),
            which is encoded at the start of the run.
        tokenizer: its folder, saved along.
        packing: ``concat`` cuts the tokens into samples, ``first_fit`` puts whole documents into
            them, ``auto`` does the latter where not every token is learned (conversations).
        separate: documents of a sample do not see each other, and their positions start anew.
        separator: what stands between the documents of a ``.txt``; empty: a file is one document.
    """

    tokens: Path
    tokenizer: Path
    packing: str = "auto"
    separate: bool = True
    separator: str = ""

    def __post_init__(self) -> None:
        _one_of("data.packing", self.packing, ("auto", "concat", "first_fit"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on linear layers; the rest of the model is frozen.

    Attributes:
        rank: of the update; 0 trains the whole model.
        alpha: the update is scaled by alpha / rank.
        targets: last parts of the names of the linear layers that get one.
        dropout: part of a layer's inputs that its update does not see.
        rslora: scale by alpha / sqrt(rank) instead.
        init_from: an adapter of PEFT to start from.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dropout: float = 0.0
    rslora: bool = False
    init_from: Path | None = None

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 0)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be at least 0 and less than 1: {self.dropout}")
        if not self.targets:
            raise ConfigError("lora.targets is empty: name the layers that are trained")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveConfig:
    """Where and when checkpoints are written.

    Attributes:
        folder: of the run: checkpoints, logs and metrics.
        every: steps between checkpoints; 0 for one at the end.
        keep_last: how many to keep; 0 for all.
        keep_every: steps whose multiples are kept for good; 0 for none.
        asynchronous: training goes on while a checkpoint is written.
        formats: of each checkpoint: ``shards``, from which a run resumes, and beside them ``dcp``
            (torch's distributed checkpoint) and ``hf`` (merged for Hugging Face).
        resume: ``auto`` continues from the newest checkpoint of the folder, if there is one,
            ``none`` starts anew, anything else is the path of a checkpoint.
    """

    folder: Path
    every: int = 0
    keep_last: int = 0
    keep_every: int = 0
    asynchronous: bool = False
    formats: tuple[str, ...] = ("shards",)
    resume: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """``every``: steps between lines of metrics; ``to``: ``tensorboard``, ``wandb`` too."""

    every: int = 1
    to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _at_least("log.every", self.every, 1)
        for name in self.to:
            _one_of("log.to", name, ("tensorboard", "wandb"))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Validation and samples.

    Attributes:
        every: steps between evaluations; 0 for none.
        batches: of ``train.batch`` rows, in each; 0 for all there are.
        tokens: what is evaluated, as ``data.tokens``; without it only a sample is written.
        prompt: text to be continued greedily; empty for no sample.
        sample_tokens: at most so many.
    """

    every: int = 0
    batches: int = 1
    tokens: Path | None = None
    prompt: str = ""
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        _at_least("eval.every", self.every, 0)
        _at_least("eval.batches", self.batches, 0)
        if self.every and self.tokens is None and not self.prompt:
            raise ConfigError("eval.every needs eval.tokens (a loss) or eval.prompt (a sample)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImatrixConfig:
    """An importance matrix for quantization, measured on the training data or on others.

    Attributes:
        every: every so many steps the inputs of a training step are measured; 0: none.
        at_end: measured on ``batches`` more batches when the run is done.
        batches: of ``at_end``.
        tokens: what ``at_end`` measures instead of the training data, as ``data.tokens``.
    """

    every: int = 0
    at_end: bool = False
    batches: int = 8
    tokens: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """GGUF types to export to when training is done; none for no export."""

    types: tuple[str, ...] = ()


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f"{name}={value!r} is none of {', '.join(known)}{did_you_mean(value, known)}"
        )
