"""Which parallelism a model needs on given GPUs, with the memory of each.

The usual rules, in order of preference: what fits one GPU is replicated; else optimizer states,
gradients, then parameters are sharded (ZeRO 1, 2, 3), within a node where nodes are joined by a
slow network; what is too large even so is cut by tensor parallelism within a node and by a pipeline
across nodes; then CPU memory helps out. Recomputing activations comes before cutting tensors.

Weights, gradients and optimizer states are those of this trainer in bf16 mixed precision: float32
parameters, gradients and two moments, 16 bytes each. Activations are estimates for micro-batches
of one sequence. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil

from ...convert.model_sizes import ModelSizes
from ...errors import ConfigError

_RESERVED = 2 << 30  # CUDA, NCCL, workspaces
_USABLE = 0.94  # of the rest, for fragments of freed memory
_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What there is."""

    gpus: int  # in all
    memory: int  # bytes of one
    nodes: int = 1
    fast: bool = True  # nodes are joined at about the speed of the links within (InfiniBand)

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ConfigError(f"{self.gpus} GPUs cannot be shared evenly by {self.nodes} nodes")

    @property
    def per_node(self) -> int:
        """GPUs of a node."""
        return self.gpus // self.nodes

    @property
    def usable(self) -> int:
        """Bytes of a GPU that a plan may fill."""
        return int((self.memory - _RESERVED) * _USABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the fullest GPU."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """A layout of training, as in ``[parallel]`` and ``[train]``, and what it takes."""

    name: str  # in words
    why: str  # the rule that chose it
    dp_replicate: int = 1
    dp_shard: int = 1
    zero: int = 3
    tp: int = 1
    pp: int = 1
    ep: int = 1
    offload: bool = False
    recompute: str = "none"
    micro_batch: int = 1  # sequences that fit at once
    lora: bool = False  # only adapters are trained, on bfloat16 weights
    memory: Memory | None = None  # of the fullest GPU
    fits: bool = False  # whether that is less than there is

    def toml(self, seq_len: int) -> str:
        """Return the sections of a run's file."""
        rows = {
            "dp_replicate": (self.dp_replicate, 1),
            "dp_shard": (self.dp_shard, 0),
            "zero": (self.zero, None),
            "tp": (self.tp, 1),
            "pp": (self.pp, 1),
            "ep": (self.ep, 1),
        }
        lines = ["[parallel]", *(f"{k} = {v}" for k, (v, usual) in rows.items() if v != usual)]
        if self.tp > 1:
            lines += ["sp = true", "loss_parallel = true"]
        if self.offload:
            lines.append("cpu_offload = true")
        batch = self.micro_batch * self.dp_replicate * self.dp_shard
        batch *= 4 * self.pp if self.pp > 1 else 1  # few bubbles
        lines += ["", "[train]", f"seq_len = {seq_len}", f"micro_batch = {self.micro_batch}"]
        lines.append(f"batch = {batch}  # or a multiple")
        lines.append(f'checkpointing = "{self.recompute}"')
        lines.append('dtype = "bfloat16"' if self.lora else 'precision = "bf16"')
        return "\n".join([*lines, *(["", "[lora]", "rank = 16"] if self.lora else [])]) + "\n"


def plan_training(
    sizes: ModelSizes, machines: Machines, seq_len: int, lora: bool = False
) -> TrainPlan:
    """Return the simplest layout that fits, or the smallest one, which then does not ``fits``."""
    smallest: TrainPlan | None = None
    for stage in _stages(sizes, machines):
        for recompute in _RECOMPUTE:
            for layout in stage:
                if recompute == "selective" and layout.ep > 1:
                    continue
                plan = _measured(sizes, replace(layout, recompute=recompute, lora=lora), seq_len)
                if _total(plan) <= machines.usable:
                    return _widened(sizes, replace(plan, fits=True), machines, seq_len)
                if smallest is None or _total(plan) < _total(smallest):
                    smallest = plan
    assert smallest is not None, "there is always a layout"
    return smallest


def _measured(sizes: ModelSizes, plan: TrainPlan, seq_len: int) -> TrainPlan:
    return replace(plan, memory=train_memory(sizes, plan, seq_len))


def _total(plan: TrainPlan) -> int:
    assert plan.memory is not None, "it was measured"
    return plan.memory.total


def _stages(sizes: ModelSizes, machines: Machines) -> Iterator[list[TrainPlan]]:
    """Yield layouts in order of preference; within a stage recomputation is tried first."""
    gpus, node = machines.gpus, machines.per_node
    if gpus == 1:
        yield [TrainPlan(name="one GPU", why="everything fits", zero=0)]
    else:
        copies = TrainPlan(name="DDP", why="a copy fits each GPU", zero=0, dp_shard=gpus)
        why = "a copy fits without optimizer states"
        yield [copies, replace(copies, name="ZeRO-1", why=why, zero=1)]
        inner = gpus if machines.fast else node
        if inner > 1:
            place = "" if inner == gpus else " within nodes, copies between them (HSDP)"
            shared = TrainPlan(
                name=f"ZeRO-2{place}",
                why="weights fit in 16 bits",
                dp_replicate=gpus // inner,
                dp_shard=inner,
                zero=2,
                ep=_experts(sizes, inner, node),
            )
            why = "a layer fits, the model does not"
            yield [shared, replace(shared, name=f"ZeRO-3{place}", why=why, zero=3)]
    yield from ([plan] for plan in _cut(sizes, machines))
    why = "only one layer at a time fits"
    yield [TrainPlan(name="ZeRO-3 with CPU offload", why=why, dp_shard=gpus, offload=True)]


def _cut(sizes: ModelSizes, machines: Machines) -> Iterator[TrainPlan]:
    """Yield layouts that cut tensors within a node, then also layers over nodes."""
    node, nodes = machines.per_node, machines.nodes
    wide = sizes.config.get("moe_intermediate_size") if sizes.experts else sizes.inner
    widths = node, sizes.kv_heads, int(wide or sizes.inner)
    for pp in (1, nodes) if nodes > 1 else (1,):
        if pp > len(sizes.layers):
            continue
        for tp in (t for t in (2, 4, 8) if not any(width % t for width in widths)):
            rest = machines.gpus // (tp * pp)
            inner = rest if machines.fast or pp > 1 else node // tp
            words = [f"TP {tp}", *([f"PP {pp}"] if pp > 1 else []), *(["ZeRO-3"] * (inner > 1))]
            yield TrainPlan(
                name=" x ".join(words),
                why="the network between nodes carries a pipeline best"
                if pp > 1
                else "layers or activations are too large for one GPU",
                dp_replicate=rest // inner,
                dp_shard=inner,
                zero=3 if inner > 1 else 0,
                tp=tp,
                pp=pp,
            )


def _experts(sizes: ModelSizes, ranks: int, node: int) -> int:
    """Return the largest expert parallel degree within a node."""
    degrees = range(1, min(ranks, node) + 1)
    fits = (d for d in degrees if ranks % d == 0 and sizes.experts % d == 0)
    return max(fits) if sizes.experts else 1


def _widened(sizes: ModelSizes, plan: TrainPlan, machines: Machines, seq_len: int) -> TrainPlan:
    """Return the plan with the largest micro-batch, a power of two up to 32, that fits."""
    while plan.micro_batch < 32:
        wider = _measured(sizes, replace(plan, micro_batch=2 * plan.micro_batch), seq_len)
        if _total(wider) > machines.usable:
            break
        plan = wider
    return plan


def train_memory(sizes: ModelSizes, plan: TrainPlan, seq_len: int) -> Memory:
    """Return what the fullest GPU of a layout holds."""
    layers = ceil(len(sizes.layers) / plan.pp)
    largest = max(sizes.layers)
    ends = sizes.rest if plan.pp == 1 else max(sizes.rest // 2, sizes.vocab * sizes.hidden)
    mine = (layers * largest if plan.pp > 1 else sum(sizes.layers)) // plan.tp + ends // plan.tp
    shards = plan.dp_shard if plan.zero >= 2 else 1
    wide = 2 if plan.lora else 4
    trained = 0 if plan.lora else mine
    states = plan.dp_shard * plan.dp_replicate if plan.zero == 1 else shards
    on_gpu = 0 if plan.offload else 1
    unit = (largest + ends) // plan.tp
    gathered = 0
    if plan.zero == 3 and (plan.dp_shard > 1 or plan.offload):
        gathered = 2 * (unit + largest // plan.tp) + (0 if plan.lora else 4 * unit)
    elif plan.zero == 2:
        gathered = 2 * mine + (0 if plan.lora else 4 * unit)
    elif not plan.lora:
        gathered = 2 * mine
    tokens = plan.micro_batch * seq_len
    held = layers * plan.pp  # the first stage has a micro-batch for each stage
    activations = tokens * (held * _kept(sizes, plan) + _working(sizes, plan))
    return Memory(
        weights=on_gpu * wide * mine // shards,
        gradients=on_gpu * 4 * trained // shards,
        optimizer=on_gpu * 8 * trained // states,
        gathered=gathered,
        activations=activations,
        logits=tokens * sizes.vocab * 10 // plan.tp,
    )


def _kept(sizes: ModelSizes, plan: TrainPlan) -> int:
    """Return bytes per token and layer that wait for backward."""
    hidden, attention, inner = _widths(sizes, plan)
    if plan.recompute == "full":
        return 2 * hidden
    if plan.recompute == "selective":
        return 2 * hidden + 2 * attention + 2 * (hidden + inner)
    return _working(sizes, plan)


def _working(sizes: ModelSizes, plan: TrainPlan) -> int:
    """Return bytes per token of a whole layer: float32 norms, attention, feed-forward."""
    hidden, attention, inner = _widths(sizes, plan)
    return 20 * hidden + 2 * attention + 8 * inner


def _widths(sizes: ModelSizes, plan: TrainPlan) -> tuple[int, int, int]:
    """Return the widths of a rank: hidden states, all of attention, feed-forward."""
    query, shared = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    tp = plan.tp
    return sizes.hidden // tp, (3 * query + 2 * shared) // tp, sizes.inner // tp
