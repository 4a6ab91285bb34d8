"""Trains a tiny BLOOM as BigScience did: DeepSpeed's PipelineModule, tensor parallel,
BF16_Optimizer.

    python bloom_training.py OUT TP PP DP

The list of layers, their modules and their names are those of Megatron-DeepSpeed's BLOOM; layers
are cut over tensor-parallel ranks and computed by hand. OUT gets ``ckpt/``, ``loss.json`` (of one
batch after training) and per model-parallel rank ``truth_{stage}_{tp}.npz`` with what its engine
holds: ``fp32/<name>``, ``exp_avg/<name>``, ``exp_avg_sq/<name>``.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tiny_training import forked, no_compiling
from torch import nn
from torch.nn import functional

HIDDEN, HEADS, LAYERS, VOCAB, LENGTH, BATCH = 32, 4, 3, 136, 12, 4
TP = 1
GROUP: Any = None


class _Copy(torch.autograd.Function):
    """To all tensor-parallel ranks: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=GROUP)
        return grad


class _Reduce(torch.autograd.Function):
    """The sum over tensor-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=GROUP)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Gather(torch.autograd.Function):
    """All columns; each rank gets the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(TP)]
        dist.all_gather(parts, x.contiguous(), group=GROUP)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.chunk(TP, -1)[dist.get_rank(GROUP)].contiguous()


class WordEmbeddings(nn.Module):
    """The rows of one rank, and the norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(VOCAB // TP, HIDDEN))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, length] to [batch, length, hidden]."""
        local = ids - dist.get_rank(GROUP) * self.weight.shape[0]
        mine = (local >= 0) & (local < self.weight.shape[0])
        rows = functional.embedding(local * mine, self.weight) * mine[..., None]
        return self.norm(_Reduce.apply(rows))


class EmbeddingPipe(nn.Module):
    """Layer 1; the last layer uses it again."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = WordEmbeddings()

    @property
    def word_embeddings_weight(self) -> torch.Tensor:
        """What is tied."""
        return self.word_embeddings.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, length] to [batch, length, hidden]."""
        return self.word_embeddings(ids)


class Attention(nn.Module):
    """Alibi attention of a rank's heads: rows [q, k, v] head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN // TP)
        self.dense = nn.Linear(HIDDEN // TP, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden]."""
        size, heads, length = HIDDEN // HEADS, HEADS // TP, x.shape[1]
        fused = self.query_key_value(_Copy.apply(x)).unflatten(-1, (heads, 3, size))
        q, k, v = (fused[..., i, :].transpose(1, 2) for i in range(3))
        first = dist.get_rank(GROUP) * heads
        slopes = 2.0 ** (-8 / HEADS * (torch.arange(first, first + heads) + 1))
        bias = slopes[:, None, None] * torch.arange(length)
        scores = (q @ k.transpose(-1, -2)).float() / size**0.5 + bias
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(x.dtype)
        out = (weights @ v).transpose(1, 2).flatten(2)
        return _Reduce.apply(functional.linear(out, self.dense.weight)) + self.dense.bias


class Mlp(nn.Module):
    """GELU in its tanh form."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(HIDDEN, 4 * HIDDEN // TP)
        self.dense_4h_to_h = nn.Linear(4 * HIDDEN // TP, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise over positions."""
        inner = functional.gelu(self.dense_h_to_4h(_Copy.apply(x)), approximate="tanh")
        out = functional.linear(inner, self.dense_4h_to_h.weight)
        return _Reduce.apply(out) + self.dense_4h_to_h.bias


class Block(nn.Module):
    """A transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.self_attention = Attention()
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN)
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-norm residual block."""
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


def _head(embedding: EmbeddingPipe, x: torch.Tensor) -> torch.Tensor:
    return _Gather.apply(functional.linear(_Copy.apply(x), embedding.word_embeddings.weight))


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _fill(module: nn.Module, rank: int) -> None:
    """Values by name; what is cut differs from rank to rank, copies do not."""
    for name, p in module.named_parameters():
        cut = any(w in name for w in ("embeddings.weight", "query_key", "h_to_4h")) or (
            p.ndim > 1 and "norm" not in name
        )
        p.model_parallel = cut  # as Megatron marks it, for the norm of the gradients
        seed = zlib.crc32(name.encode()) + (rank if cut else 0)
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        norm = p.ndim == 1 and name.endswith("weight")
        p.data.copy_(1 + 0.1 * noise if norm else 0.1 * noise)


def data(seed: int) -> Any:
    """A batch of (tokens, labels), for ever."""
    rows = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    while True:
        yield rows[:, :-1], rows[:, 1:]


def train(out: Path, tp: int, pp: int, dp: int) -> list[float]:
    """Three steps, the save, the truth of this rank."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    global TP, GROUP
    no_compiling()
    TP = tp
    deepspeed.init_distributed("gloo")
    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    for ranks in topology.get_axis_comm_lists("model"):
        group = dist.new_group(ranks)
        GROUP = group if dist.get_rank() in ranks else GROUP
    embed = partial(
        TiedLayerSpec, "embed", EmbeddingPipe, tied_weight_attr="word_embeddings_weight"
    )
    specs = [_same, embed(), _same, *(LayerSpec(Block) for _ in range(LAYERS)), _same]
    specs += [LayerSpec(nn.LayerNorm, HIDDEN), embed(forward_fn=_head)]
    net = PipelineModule(specs, topology=topology, loss_fn=_loss, partition_method="type:block")
    rank = dist.get_rank(GROUP)
    _fill(net, rank)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    wide = [p for p in net.parameters() if p.ndim > 1]
    slim = [p for p in net.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": wide}, {"params": slim, "weight_decay": 0.0}], lr=3e-3
    )
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    for step in range(3):
        engine.train_batch(data(10 * step + engine.grid.get_data_parallel_rank()))
    args = argparse.Namespace(
        hidden_size=HIDDEN, num_layers=LAYERS, num_attention_heads=HEADS, layernorm_epsilon=1e-5,
        padded_vocab_size=VOCAB, seq_length=LENGTH, apply_residual_connection_post_layernorm=False,
    )  # fmt: skip
    engine.save_checkpoint(
        str(out / "ckpt"), client_state={"args": args, "checkpoint_version": 3.0}
    )
    truth = {}
    for name, p in engine.module.named_parameters():
        truth[f"fp32/{name}"] = safe_get_full_fp32_param(p).numpy().copy()
        for state in ("exp_avg", "exp_avg_sq"):
            truth[f"{state}/{name}"] = safe_get_full_optimizer_state(p, state).numpy().copy()
    if engine.grid.get_data_parallel_rank() == 0:
        np.savez(out / f"truth_{engine.stage_id}_{rank}.npz", **truth)
    loss = float(engine.eval_batch(data(77)))
    if dist.get_rank() == 0:
        (out / "loss.json").write_text(json.dumps(loss))
    return [loss]


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # once, before the ranks are forked

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    sizes = [int(n) for n in sys.argv[2:5]]
    forked(sizes[0] * sizes[1] * sizes[2], partial(train, Path(sys.argv[1]), *sizes), port)
