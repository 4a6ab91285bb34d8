"""Parallelisation of a model part: context, experts, tensors, recomputation, compilation, data.

All with torch's own parts, in this order. Data parallelism is FSDP2 (``fully_shard``: ZeRO 2 and 3,
HSDP) or its replicating sibling (DDP, ZeRO 1). The loss is a sum divided by the token count of the
whole step (``engine.py``), so gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .attention import Context
from .lora.adapters import add_adapters
from .mesh import EXPERT_FSDP, FSDP, TOKENS, Meshes
from .model import Decoder, Layer
from .moe import MoE
from .settings import RunConfig
from .tensor import cut_experts, cut_tensors

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parallelize(part: Decoder, meshes: Meshes, config: RunConfig) -> None:
    """Apply a run's parallelism to a model part on the meta device, in place."""
    if meshes.size("cp") > 1:
        size, rank = meshes.size("cp"), meshes.rank("cp")
        part.set_context(Context(meshes.sub("cp"), rank, size, meshes.device))
    cut_experts(part, meshes)
    if meshes.size("tp") > 1:
        cut_tensors(part, meshes.sub("tp"), config.parallel)
        if config.train.compile and part.first:
            # compiled layers take no tensor that is still on its way
            part.model.embed_tokens.register_forward_hook(lambda *args: args[-1].clone())
    part.tie()
    if config.lora.rank:
        add_adapters(part, config.lora, config.train.seed)
    for layer in part.model.layers.values():
        assert isinstance(layer, Layer)
        _wrap(layer, config.train.checkpointing, config.train.compile)
    data_parallel = meshes.size(*TOKENS) > 1
    if data_parallel or config.train.precision != "full" or config.parallel.cpu_offload:
        _share(part, meshes, config)


def _wrap(layer: Layer, recompute: str, compiled: bool) -> None:
    """Recompute and compile a layer; the names of its parameters stay as they are.

    What is fully recomputed is compiled inside (torch 2.13 cannot compile the recomputation of
    tensor parallel layers); what is kept selectively is chosen among compiled operations.
    """
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute == "selective":
        layer.body = partial(checkpoint, layer.body, context_fn=_selective_contexts, **settings)
    if compiled:
        layer.body = torch.compile(layer.body)
    if recompute == "full":
        layer.body = partial(checkpoint, layer.body, **settings)


def _selective_contexts() -> Any:
    """Keep attention, communication and every other matrix product; recompute the rest."""
    aten = torch.ops.aten
    kept = {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        torch.ops._c10d_functional.all_to_all_single.default,
    }
    products = {False: 0, True: 0}  # in forward, in recomputation

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if op == aten.mm.default:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        else:
            keep = op in kept
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]  # torch


def _share(part: Decoder, meshes: Meshes, config: RunConfig) -> None:
    """Share parameters, gradients and optimizer states over the data parallel ranks, in place."""
    half = _HALVES.get(config.train.precision)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    zero = config.parallel.zero
    cuda = meshes.device.type == "cuda"
    offload: OffloadPolicy = OffloadPolicy()
    if config.parallel.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=cuda)

    def share(module: nn.Module, names: tuple[str, ...], cut: Any = None) -> None:
        if zero < 2:
            replicate(module, mesh=meshes.sub("dp_replicate", *names), mp_policy=policy)
            return
        mesh = meshes.sub(*names)
        if meshes.size("dp_replicate") > 1:
            mesh = DeviceMesh._concatenate([meshes.sub("dp_replicate"), mesh])
        fully_shard(
            module,
            mesh=mesh,
            # backward begins with the rest, so it is not released in between
            reshard_after_forward=zero == 3 and module is not part,
            shard_placement_fn=cut,
            mp_policy=policy,
            offload_policy=offload,
        )

    for layer in part.model.layers.values():
        assert isinstance(layer, Layer)
        feed = layer.feed_forward
        if isinstance(feed, MoE) and meshes.size("ep") > 1:
            share(feed.experts, EXPERT_FSDP, partial(_along_hidden, meshes.size(*EXPERT_FSDP)))
        share(layer, FSDP)
    share(part, FSDP)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # a plain sum: gloo lacks the pre-multiplied one that a divide factor asks for
            module.set_force_sum_reduction_for_comms(True)


def _along_hidden(ranks: int, stack: nn.Parameter) -> Shard | None:
    """Cut a stack of experts along its hidden dimension, which nothing else cuts, if that works."""
    dim = 1 if stack.shape[1] < stack.shape[2] else 2
    return Shard(dim) if stack.shape[dim] % ranks == 0 else None
