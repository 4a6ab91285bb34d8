"""The sections of a run's TOML file, one frozen dataclass each (``[model]``: ``model.py``).

What a value may be is said by its annotation: ``Annotated[int, 1]`` is at least 1,
``Annotated[str, ("a", "b")]`` is one of these. What only a number of processes shows is refused by
``degrees.py``. ``docs/training.md`` describes all keys. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from ...errors import ConfigError, did_you_mean

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

Count = Annotated[int, 0]
Positive = Annotated[int, 1]


class Section:
    """Refuses values that their annotations do not allow, and what ``check`` refuses."""

    __slots__ = ()

    def __post_init__(self) -> None:
        kind: Any = type(self)
        section = kind.__name__.removesuffix("Config").lower()
        for name, limit in _limits(kind).items():
            value, where = getattr(self, name), f"{section}.{name}"
            if isinstance(limit, int):
                if value < limit:
                    raise ConfigError(f"{where} must be at least {limit}, not {value}")
                continue
            known = [str(one) for one in limit]
            for one in value if isinstance(value, tuple) else (value,):
                if one not in limit:
                    near = did_you_mean(str(one), known)
                    raise ConfigError(f"{where}={one!r} is none of {', '.join(known)}{near}")
        self.check()

    def check(self) -> None:
        """Refuse values that do not go together."""


@cache
def _limits(kind: type[Section]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: h.__metadata__[0] for name, h in hints.items() if hasattr(h, "__metadata__")}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig(Section):
    """How the processes share the work. The product of the degrees is the number of processes."""

    dp_replicate: Positive = 1  # copies of the sharded model (HSDP when dp_shard > 1)
    dp_shard: Count = 0  # ranks over which a copy is sharded; 0: what the other degrees leave
    # what they shard: nothing (DDP), optimizer states, also gradients, also parameters
    zero: Annotated[int, range(4)] = 3
    tp: Positive = 1
    sp: bool = False  # between the tensor parallel blocks the sequence is sharded over tp
    loss_parallel: bool = False  # the loss is computed on logits sharded over the vocabulary
    pp: Positive = 1
    schedule: Annotated[str, SCHEDULES] = "1F1B"
    microbatches: Count = 0  # of the pipeline, per step; 0 follows train.micro_batch
    cp: Positive = 1  # ranks that share each sequence
    ep: Positive = 1  # ranks that share each layer's experts, taken from dp_shard
    cpu_offload: bool = False  # parameters, gradients and optimizer states lie in CPU memory

    def check(self) -> None:
        if self.cpu_offload and self.zero < 2:
            raise ConfigError("parallel.cpu_offload needs parallel.zero 2 or 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(Section):
    """How long, on how much, and with which arithmetic."""

    steps: Positive
    seq_len: Positive
    batch: Positive  # sequences per step, over all ranks and micro-batches
    micro_batch: Count = 0  # sequences that a rank computes at once; 0 for all of its part
    dtype: Annotated[str, ("float32", "bfloat16", "float64")] = "float32"  # of parameters
    precision: Annotated[str, ("full", "bf16", "fp16")] = "full"  # of arithmetic: dtype's, or mixed
    seed: int = 0  # of the initial weights and of the order of the data
    clip: float = 1.0  # largest gradient norm; 0 never clips
    threads: Count = 0  # CPU threads per rank; 0 shares the machine's cores among the ranks
    # recomputed in backward; selective: all but attention and every other matrix product
    checkpointing: Annotated[str, ("none", "selective", "full")] = "none"
    compile: bool = False  # each layer
    device: Annotated[str, ("auto", "cpu", "cuda")] = "auto"  # auto: CUDA where there is one

    def check(self) -> None:
        if self.precision != "full" and self.dtype != "float32":
            raise ConfigError(
                f"train.precision={self.precision!r} keeps float32 parameters; remove train.dtype="
                f"{self.dtype!r}, or use precision 'full'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig(Section):
    """AdamW, or Muon for the matrices inside layers and AdamW for the rest."""

    lr: float  # peak, of AdamW
    name: Annotated[str, ("adamw", "muon")] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices only
    muon_lr: float = 0.0  # 0: lr; updates are scaled to the size of AdamW's
    muon_momentum: float = 0.95
    fused: bool = True  # one kernel for all parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig(Section):
    """The learning rate over the steps, as a factor of its peak."""

    kind: Annotated[str, ("cosine", "linear", "constant", "wsd")] = "cosine"
    warmup: Count = 0  # steps of linear rise
    decay: Count = 0  # last steps of wsd, over which it falls; 0 for a tenth of all
    floor: float = 0.1  # where it ends


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(Section):
    """What is trained on: a token file, a folder of ``mconv tokenize``, or text."""

    tokens: Path
    tokenizer: Path  # its folder, saved along
    # concat cuts tokens into samples, first_fit puts whole documents into them; auto does the
    # latter where not every token is learned (conversations)
    packing: Annotated[str, ("auto", "concat", "first_fit")] = "auto"
    separate: bool = True  # documents of a sample do not see each other; positions start anew
    separator: str = ""  # between the documents of a .txt; empty: a file is one


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adapters on linear layers; the rest of the model is frozen."""

    rank: Count = 0  # 0 trains the whole model
    alpha: float = 16.0  # the update is scaled by alpha / rank
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # last parts of names
    dropout: float = 0.0  # part of a layer's inputs that its update does not see
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    init_from: Path | None = None  # an adapter of PEFT

    def check(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be at least 0 and less than 1: {self.dropout}")
        if not self.targets:
            raise ConfigError("lora.targets is empty: name the layers that are trained")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveConfig(Section):
    """Where and when checkpoints are written, and which one a run resumes from."""

    folder: Path  # of the run: checkpoints, logs and metrics
    every: Count = 0  # steps; 0 for one at the end
    keep_last: Count = 0  # 0 for all
    keep_every: Count = 0  # steps whose multiples are kept for good; 0 for none
    asynchronous: bool = False  # training goes on while a checkpoint is written
    # shards, from which a run resumes, and beside them torch's own format or a merged model
    formats: Annotated[tuple[str, ...], ("shards", "dcp", "hf")] = ("shards",)
    resume: str = "auto"  # the newest of the folder if there is one; "none"; or a path

    def check(self) -> None:
        if "shards" not in self.formats:
            raise ConfigError('save.formats must have "shards", from which a run resumes')


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig(Section):
    """What is told of the steps besides the files that are always there."""

    every: Positive = 1
    to: Annotated[tuple[str, ...], ("tensorboard", "wandb")] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(Section):
    """Validation and samples."""

    every: Count = 0  # steps; 0 for none
    batches: Count = 1  # of train.batch rows, in each; 0 for all there are
    tokens: Path | None = None  # what is evaluated, as data.tokens
    prompt: str = ""  # text to be continued greedily; empty for no sample
    sample_tokens: Count = 64  # at most so many

    def check(self) -> None:
        if self.every and self.tokens is None and not self.prompt:
            raise ConfigError("eval.every needs eval.tokens (a loss) or eval.prompt (a sample)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImatrixConfig(Section):
    """An importance matrix for quantization."""

    every: Count = 0  # steps of which one is measured; 0: none
    at_end: bool = False  # measure more batches when the run is done
    batches: Count = 8  # of at_end
    tokens: Path | None = None  # what at_end measures instead of the training data


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(Section):
    """GGUF types to export to when training is done; none for no export."""

    types: tuple[str, ...] = ()
