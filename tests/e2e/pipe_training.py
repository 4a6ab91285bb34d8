"""A tiny PipelineModule and its training under DeepSpeed's PipelineEngine, with tensor parallelism.

The layers are an embedding, blocks whose matrices are cut by hand as Megatron-DeepSpeed cuts them,
a norm and a head, which may be tied to the embedding. Losses are comparable for any layout, as in
``tiny_training``, which gives the batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_training import ADAM, BATCH, HIDDEN, VOCAB, WIDTH, batch, go_on
from torch import nn
from torch.nn import functional

HEADS, BLOCKS, MICRO = 4, 3, 2
RULES = {  # what Megatron-DeepSpeed's models tell of their cut
    "universal_checkpoint_version": 0.2,
    "vocabulary_parameter_patterns": [],
    "tp_replicated_parameter_patterns": [
        r"\d+\.weight", r"\d+\..*layernorm\.weight", r"tied_modules\.embed\.weight",
        r"\d+\.mlp\.down_proj\.bias",
    ],
    "parameter_with_row_parallelism_patterns": [
        r"\d+\.self_attn\.o_proj\.weight", r"\d+\.mlp\.down_proj\.weight",
    ],
}  # fmt: skip


class _Copy(torch.autograd.Function):
    """The same on all ranks; gradients are added up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Add(torch.autograd.Function):
    """The sum of all ranks; gradients are the same."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class Cut(nn.Module):
    """A rank's part of a matrix, cut on a dim; the bias of a row-parallel one is whole."""

    def __init__(self, rows: int, columns: int, dim: int, group: Any, *, bias: bool) -> None:
        super().__init__()
        whole = torch.randn(rows, columns) / columns**0.5
        world = dist.get_world_size(group)
        part = whole.chunk(world, dim)[dist.get_rank(group)].clone()
        self.weight = nn.Parameter(part)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group = group
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            dim = int(name == "o_proj")
            setattr(self.self_attn, name, Cut(HIDDEN, HIDDEN, dim, group, bias=False))
        self.mlp = nn.Module()
        self.mlp.up_proj = Cut(WIDTH, HIDDEN, 0, group, bias=False)
        self.mlp.down_proj = Cut(HIDDEN, WIDTH, 1, group, bias=True)
        self.input_layernorm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden]."""
        y = _Copy.apply(self.input_layernorm(x), self.group)
        q, k, v = (
            functional.linear(y, getattr(self.self_attn, f"{n}_proj").weight)
            .unflatten(-1, (-1, HIDDEN // HEADS))
            .transpose(1, 2)
            for n in "qkv"
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = functional.linear(y.transpose(1, 2).flatten(2), self.self_attn.o_proj.weight)
        x = x + _Add.apply(y, self.group)
        y = _Copy.apply(self.post_attention_layernorm(x), self.group)
        y = functional.silu(functional.linear(y, self.mlp.up_proj.weight))
        y = _Add.apply(functional.linear(y, self.mlp.down_proj.weight), self.group)
        return x + y + self.mlp.down_proj.bias


class Embedding(nn.Embedding):
    """Token embedding."""

    def __init__(self) -> None:
        super().__init__(VOCAB, HIDDEN)
        nn.init.normal_(self.weight, std=0.3)


def head(embedding: nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    """Logits by the embedding's own rows."""
    return functional.linear(x, embedding.weight)


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy."""
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def make_pipe(pp: int, tp: int, dp: int, *, tied: bool, method: str, seed: int) -> Any:
    """The PipelineModule of this rank."""
    from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    mine = None
    for ranks in topology.get_axis_comm_lists("model") or [[r] for r in range(pp * dp)]:
        group = dist.new_group(ranks)
        mine = group if dist.get_rank() in ranks else mine
    blocks = [LayerSpec(Block, mine) for _ in range(BLOCKS)]
    norm = LayerSpec(nn.RMSNorm, HIDDEN, eps=1e-6)
    if tied:
        first: Any = TiedLayerSpec("embed", Embedding)
        last: Any = TiedLayerSpec("embed", Embedding, forward_fn=head)
    else:
        first, last = LayerSpec(Embedding), LayerSpec(nn.Linear, HIDDEN, VOCAB, bias=False)
    return PipelineModule(
        [first, *blocks, norm, last],
        topology=topology,
        loss_fn=loss,
        partition_method=method,
        seed_layers=True,
        base_seed=seed,
        seed_fn=lambda n: torch.manual_seed(int(n)),
        activation_checkpoint_interval=0,
    )


def rows_of(step: int, rank: int, dp: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The micro batches of a data-parallel rank."""
    for rows in batch(step, rank, dp).chunk(MICRO):
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def run_pipe(
    *,
    pp: int,
    tp: int = 1,
    dtype: str = "fp32",
    stage: int = 1,
    tied: bool = False,
    method: str = "parameters",
    gather: str | None = None,
    first: int,
    last: int,
    load: Path | None = None,
    save_at: int | None = None,
    save: Path | None = None,
    forget: bool = False,
) -> list[float]:
    """Train steps ``first`` to ``last``; returns their losses.

    ``gather`` is the dtype of ``grad_accum_dtype``: fp32 with bf16 makes a BF16_Optimizer.
    """
    import deepspeed

    deepspeed.init_distributed("gloo")
    dp = dist.get_world_size() // (pp * tp)
    pipe = make_pipe(pp, tp, dp, tied=tied, method=method, seed=11 if load is None else 77)
    wide = [p for p in pipe.parameters() if p.ndim > 1]
    thin = [p for p in pipe.parameters() if p.ndim == 1]
    groups = [{"params": wide, **ADAM}, {"params": thin, **ADAM, "weight_decay": 0.0}]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // dp // MICRO,
        "gradient_accumulation_steps": MICRO,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if gather:
        config["data_types"] = {"grad_accum_dtype": gather}
    engine, *_ = deepspeed.initialize(
        model=pipe,
        optimizer=torch.optim.AdamW([g for g in groups if g["params"]], foreach=False),
        config=config,
    )
    if load is not None:
        go_on(engine, load, forget=forget)
    losses = []
    for step in range(first, last):
        if step == save_at:
            state = {"universal_checkpoint_info": RULES}
            engine.save_checkpoint(str(save), client_state=state)
        rank = engine.grid.get_data_parallel_rank()
        losses.append(float(engine.train_batch(rows_of(step, rank, dp))))
    return losses
