"""A tiny Llama-like model and its training under DeepSpeed and FSDP2, for the resume tests.

Every rank sees its part of one global batch that depends on the step alone (two batches in turn,
which it learns), so the losses of any world size and framework are comparable. Sizes divide by
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

HIDDEN, HEADS, WIDTH, VOCAB, LAYERS, BATCH, LENGTH = 28, 2, 44, 97, 2, 12, 9
ADAM = {"lr": 2e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Attention(nn.Module):
    """Causal attention, heads counted from the widths so that it can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=True)
        self.k_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden]."""
        size = HIDDEN // HEADS
        q, k, v = (
            p(x).unflatten(-1, (-1, size)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (q @ k.transpose(-1, -2)) / size**0.5
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, float("-inf")).float().softmax(-1).to(x.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.up_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise over positions."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A block, submodules registered as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = Mlp()
        self.input_layernorm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-norm residual block."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Everything but the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)


class Tiny(nn.Module):
    """The model; returns the mean loss."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.model = Body()
        nn.init.normal_(self.model.embed_tokens.weight, std=0.3)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token loss of [batch, length + 1] token numbers."""
        x = self.model.embed_tokens(tokens[:, :-1])
        for layer in self.model.layers:
            x = layer(x)
        logits = self.lm_head(self.model.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make_model(seed: int, *, tied: bool = False) -> Tiny:
    """The same weights on every rank."""
    torch.manual_seed(seed)
    return Tiny(tied=tied)


def batch(step: int, rank: int, world: int) -> torch.Tensor:
    """A rank's rows of the global batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step % 2)
    rows = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
    return rows[rank * BATCH // world : (rank + 1) * BATCH // world]


def groups(model: nn.Module, count: int = 2) -> list[dict[str, Any]]:
    """Matrices with weight decay, everything else without (or one group)."""
    if count == 1:
        return [{"params": list(model.parameters()), **ADAM}]
    plain = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], **ADAM},
        {"params": plain, **ADAM, "weight_decay": 0.0},
    ]


def mean_loss(loss: torch.Tensor, group: Any = None) -> float:
    """The loss over all data-parallel ranks."""
    total = loss.detach().float().clone()
    dist.all_reduce(total, group=group)
    return float(total) / dist.get_world_size(group)


def no_compiling() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives for the CPU.

    That takes a minute or more, and waits for ever where a killed build left its lock behind. It
    says on import what the machine can compile, and asks that before it does; gloo goes without.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_deepspeed(
    *,
    stage: int,
    dtype: str,
    first: int,
    last: int,
    load: Path | None = None,
    universal: bool = False,
    save_at: int | None = None,
    save: Path | None = None,
    forget: bool = False,
    tied: bool = False,
    count: int = 2,
    warmup: bool = False,
) -> list[float]:
    """Train steps ``first`` to ``last``; returns their losses."""
    import deepspeed

    no_compiling()
    model = make_model(0 if load is None else 7, tied=tied)
    optimizer = torch.optim.AdamW(groups(model, count), foreach=False)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at 1.0 unless told otherwise
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    if warmup:
        rates = {"warmup_min_lr": 0, "warmup_max_lr": ADAM["lr"], "warmup_num_steps": 6}
        config["scheduler"] = {"type": "WarmupLR", "params": rates}
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if load is not None:
        go_on(engine, load, forget=forget)
    losses = []
    for step in range(first, last):
        if step == save_at:
            engine.save_checkpoint(str(save))
        loss = engine(batch(step, dist.get_rank(), dist.get_world_size()))
        losses.append(mean_loss(loss))
        engine.backward(loss)
        engine.step()
    return losses


def go_on(engine: Any, load: Path, *, forget: bool) -> None:
    """Load a checkpoint into a DeepSpeed engine; ``forget`` zeroes the moments then."""
    path, _ = engine.load_checkpoint(str(load))
    assert path is not None, f"nothing was loaded from {load}"
    if forget:
        _forget(getattr(engine.optimizer, "optimizer", engine.optimizer))


def _forget(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            else:
                state[key] = 0


def run_fsdp(
    *,
    dp: int,
    tp: int = 1,
    first: int,
    last: int,
    load: Path | None = None,
    save_at: int | None = None,
    save: Path | None = None,
    forget: bool = False,
    tied: bool = False,
) -> list[float]:
    """Train under FSDP2, with tensor parallel when ``tp`` is above 1."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    model = make_model(0 if load is None else 7, tied=tied)
    if tp > 1:
        _tensor_parallel(model, mesh["tp"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(groups(model), foreach=False)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # adds initial_lr to the groups
    if load is not None:
        _first_step(optimizer)
        weights, state = get_state_dict(model, optimizer)
        whole = {"model": weights, "optim": state}
        dcp.load(whole, checkpoint_id=str(load))
        set_state_dict(
            model, optimizer, model_state_dict=whole["model"], optim_state_dict=whole["optim"]
        )
        if forget:
            _forget(optimizer)
    losses = []
    rank, group = mesh["dp"].get_local_rank(), mesh["dp"].get_group()
    for step in range(first, last):
        if step == save_at:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optim": state}, checkpoint_id=str(save))
        loss = model(batch(step, rank, dp))
        losses.append(mean_loss(loss, group))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _first_step(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its states, as ``get_state_dict`` needs them to load into."""
    for part in optimizer.param_groups:
        for p in part["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()


def _tensor_parallel(model: Tiny, mesh: Any) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    columns += ("mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    plan: dict[str, Any] = {n: ColwiseParallel() for n in columns}
    plan |= {n: RowwiseParallel() for n in rows}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        },
    )


def preload() -> None:
    """Import before forking what the frameworks would import in every rank: most of its time."""
    import deepspeed.module_inject  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel

    torch.set_num_threads(1)


def forked(world: int, job: Callable[[], list[float]], port: int) -> list[float]:
    """Run a job on ``world`` forked ranks; returns what rank 0 returned.

    Forking saves importing the frameworks again in every rank, after ``preload``.
    """
    import multiprocessing

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def rank_main(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=world)
        losses = job()
        dist.barrier()
        if rank == 0:
            queue.put(losses)
        os._exit(0)  # no teardown of half the framework in a fork

    ranks = [context.Process(target=rank_main, args=(r,)) for r in range(world)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join()
    assert all(p.exitcode == 0 for p in ranks), "a rank failed; see its output"
    return queue.get()
