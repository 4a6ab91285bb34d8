"""The parallel degrees of a run, resolved for a number of processes and refused where impossible.

Everything that arithmetic can refuse is refused here, before a process group or a tensor exists;
every message has the numbers and the values that would do. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ...errors import ConfigError
from .run import RunConfig
from .sections import SCHEDULES, SPLIT_BACKWARD


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """A layout: ranks are numbered with ``tp`` fastest, then cp, ep and the rest of dp, pp."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1  # divides dp_shard; the product of the others is the number of processes
    stages: int = 1  # pipeline stages of each rank
    rows: int = 1  # sequences of a data parallel rank per step
    micro_batch: int = 1  # sequences computed at once

    @property
    def dp(self) -> int:
        """Data parallel ranks: parts into which the batch is cut."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_mod(self) -> int:
        """What ``ep`` leaves of ``dp_shard``."""
        return self.dp_shard // self.ep

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank per step."""
        return self.rows // self.micro_batch

    def __str__(self) -> str:
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
        said = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) > 1]
        return " ".join(said) or "one process"


def resolve(config: RunConfig, world_size: int) -> Degrees:
    """Return the layout of a run on ``world_size`` processes.

    Raises:
        ConfigError: the degrees do not fit the processes, the model or the batch.
    """
    p = config.parallel
    fixed = {"pp": p.pp, "dp_replicate": p.dp_replicate, "cp": p.cp, "tp": p.tp}
    product = prod(fixed.values())
    said = " * ".join(f"{k}={v}" for k, v in fixed.items() if v > 1) or "1"
    dp_shard = p.dp_shard or max(1, world_size // product)
    if product * dp_shard != world_size:
        raise ConfigError(
            f"parallel: {said} * dp_shard={dp_shard} is {product * dp_shard}, but there are "
            f"{world_size} processes; start {product * dp_shard}, or change a degree"
        )
    dp = p.dp_replicate * dp_shard
    train = config.train
    _divides("batch", train.batch, "data parallel ranks", dp, "train")
    rows = train.batch // dp
    if p.pp > 1 and p.microbatches:
        _divides(f"batch={train.batch} / dp={dp} = rows", rows, "microbatches", p.microbatches)
        micro_batch = rows // p.microbatches
    else:
        micro_batch = train.micro_batch or rows
        _divides(f"batch={train.batch} / dp={dp} = rows", rows, "micro_batch", micro_batch)
    degrees = Degrees(
        pp=p.pp,
        dp_replicate=p.dp_replicate,
        dp_shard=dp_shard,
        cp=p.cp,
        tp=p.tp,
        ep=p.ep,
        stages=SCHEDULES[p.schedule] if p.pp > 1 else 1,
        rows=rows,
        micro_batch=micro_batch,
    )
    _check_tensor(config, degrees)
    _check_pipeline(config, degrees)
    _check_split_backward(config, degrees)
    _check_rest(config, degrees)
    return degrees


def _check_tensor(config: RunConfig, d: Degrees) -> None:
    model, p = config.model, config.parallel
    if d.tp == 1:
        if p.sp or p.loss_parallel:
            raise ConfigError("parallel.sp and parallel.loss_parallel need parallel.tp > 1")
        return
    for name in ("num_key_value_heads", "num_attention_heads"):
        _divides(name, getattr(model, name), "tp", d.tp)
    inner = "moe_intermediate_size" if model.num_experts else "intermediate_size"
    _divides(inner, getattr(model, inner), "tp", d.tp)
    if p.sp:
        _divides(f"seq_len={config.train.seq_len} / cp={d.cp}", config.train.seq_len // d.cp,
                 "tp", d.tp, "train")  # fmt: skip


def _check_pipeline(config: RunConfig, d: Degrees) -> None:
    if d.pp == 1:
        return
    stages, layers = d.pp * d.stages, config.model.num_hidden_layers
    name = config.parallel.schedule
    if layers < stages:
        raise ConfigError(
            f"parallel.pp={d.pp} with {name} has {d.pp} * {d.stages} = {stages} stages, but there "
            f"are only num_hidden_layers={layers}"
        )
    multiple = d.pp if name == "Interleaved1F1B" else 1
    if d.micro_batches < stages or d.micro_batches % multiple:
        wrong = f"do not fill {stages} pipeline stages"
        if d.micro_batches >= stages:
            wrong = f"are not divisible by pp={d.pp}, which {name} needs"
        raise ConfigError(
            f"{d.micro_batches} micro-batches (batch={config.train.batch} / dp={d.dp} / "
            f"micro_batch={d.micro_batch}) {wrong}; use {_fitting(config, d, stages, multiple)}"
        )


def _fitting(config: RunConfig, d: Degrees, stages: int, multiple: int) -> str:
    """Say which settings give at least ``stages`` micro-batches, a multiple of ``multiple``."""
    sizes = range(d.rows // stages, 0, -1)
    size = next((n for n in sizes if d.rows % n == 0 and d.rows // n % multiple == 0), 0)
    rows = d.rows if size else -(-stages // multiple) * multiple
    fit = f"train.micro_batch={size or 1}"
    if config.parallel.microbatches:
        fit = f"parallel.microbatches={rows // (size or 1)}"
    return fit if size else f"train.batch={rows * d.dp} (or a multiple) and {fit}"


def _check_split_backward(config: RunConfig, d: Degrees) -> None:
    """Refuse what torch computes wrongly or not at all when a schedule splits backward."""
    name = config.parallel.schedule
    if d.pp == 1 or name not in SPLIT_BACKWARD:
        return
    if d.dp * d.cp > 1 and config.parallel.zero == 3:
        raise ConfigError(
            f"parallel.schedule={name!r} computes gradients of weights after zero=3 has released "
            "them, and torch loses these gradients; use parallel.zero=2, or another schedule "
            "(Interleaved1F1B)"
        )
    if config.train.checkpointing == "selective":
        raise ConfigError(
            f"parallel.schedule={name!r} runs backward twice, which selective checkpointing "
            "cannot; use train.checkpointing 'full' or 'none'"
        )


def _check_rest(config: RunConfig, d: Degrees) -> None:
    experts = config.model.num_experts
    train = config.train
    if experts and "dcp" in config.save.formats:
        raise ConfigError(
            'save.formats: "dcp" has no place for single experts; use "shards", and mconv reshard '
            "--to dcp for a checkpoint that needs it"
        )
    if d.tp > 1 and train.compile and train.checkpointing == "selective":
        raise ConfigError(
            "train.checkpointing='selective' and train.compile do not go together with parallel.tp "
            "> 1 in torch; use checkpointing 'full' or 'none'"
        )
    if d.ep > 1:
        if not experts:
            raise ConfigError(f"parallel.ep={d.ep}: model.num_experts is 0; use 1")
        _divides("num_experts", experts, "ep", d.ep)
        _divides("dp_shard", d.dp_shard, "ep", d.ep, "parallel")
        if config.train.checkpointing == "selective":
            raise ConfigError(
                "train.checkpointing='selective' cannot recompute experts of other ranks; use "
                "'full' or 'none' with parallel.ep > 1"
            )
    _divides("seq_len", config.train.seq_len, "cp", d.cp, "train")


def _divides(name: str, value: int, by: str, degree: int, section: str = "model") -> None:
    """Refuse a degree that does not divide ``value``, naming those that do."""
    if value % degree:
        valid = [n for n in range(1, min(value, 4096) + 1) if value % n == 0]
        said = ", ".join(map(str, valid[:12]))
        more = "" if section != "train" else f" (or a multiple of {degree} for {section}.{name})"
        raise ConfigError(f"{by}={degree} does not divide {name}={value}; use {said}{more}")
