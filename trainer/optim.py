"""Optimizers: AdamW with weight decay on matrices only, Muon for the matrices inside layers.

With ZeRO 1 every rank holds all parameters and gradients, but updates only its shard of each: the
optimizer works on shards, and the updated ones are gathered after its step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from .sections import OptimConfig

PEAK = "peak_lr"


def build_optimizers(
    slots: Mapping[str, Tensor], config: OptimConfig
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of named tensors; each group knows its peak rate as ``peak_lr``.

    Groups also part tensors of different device meshes, which torch's kernels cannot mix.
    """
    muon = {n: p for n, p in slots.items() if config.name == "muon" and _is_inner_matrix(n, p)}
    rest = {n: p for n, p in slots.items() if n not in muon}
    out: list[torch.optim.Optimizer] = []
    if rest:
        groups = _groups(rest, config.weight_decay)
        out.append(
            torch.optim.AdamW(
                groups,
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                fused=config.fused,
            )
        )
    if muon:
        out.append(
            torch.optim.Muon(
                muon.values(),
                lr=config.muon_lr or config.lr,
                weight_decay=config.weight_decay,
                momentum=config.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in out:
        for group in optimizer.param_groups:
            group[PEAK] = group["lr"]
    return out


def set_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every learning rate to ``factor`` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[PEAK] * factor


def shards(parameters: Mapping[str, nn.Parameter], dims: set[str]) -> dict[str, Tensor]:
    """Return this rank's shard of each parameter that is replicated over mesh dimensions ``dims``.

    A shard is a ``DTensor`` of the whole shape, cut along the first dimension that nothing else
    cuts; a parameter without such a dimension is its own shard.
    """
    return {name: _shard(p, dims) for name, p in parameters.items()}


def link(
    optimizers: Iterable[torch.optim.Optimizer],
    parameters: Mapping[str, nn.Parameter],
    slots: Mapping[str, Tensor],
) -> None:
    """Make every step take gradients from ``parameters`` to their shards and updates back."""
    owners = {id(q): o for o in optimizers for group in o.param_groups for q in group["params"]}
    linked: dict[torch.optim.Optimizer, list[tuple[DTensor, DTensor]]] = {}
    for name, parameter in parameters.items():
        shard = slots[name]
        if shard is not parameter:
            assert isinstance(parameter, DTensor)
            assert isinstance(shard, DTensor)
            linked.setdefault(owners[id(shard)], []).append((parameter, shard))

    @torch.no_grad()
    def take(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, shard in linked.get(optimizer, ()):
            if parameter.grad is not None:
                shard.copy_(parameter.redistribute(placements=shard.placements))
                shard.grad = cast(DTensor, parameter.grad).redistribute(placements=shard.placements)

    @torch.no_grad()
    def give(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, shard in linked.get(optimizer, ()):
            parameter.copy_(shard.redistribute(placements=parameter.placements))
            shard.grad = None

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(take)
        optimizer.register_step_post_hook(give)


def _shard(parameter: nn.Parameter, dims: set[str]) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    names = parameter.device_mesh.mesh_dim_names or ()
    taken = {p.dim for p in parameter.placements if isinstance(p, Shard)}
    free = [dim for dim in range(parameter.ndim) if dim not in taken]
    axes = [i for i, name in enumerate(names) if name in dims]
    if not free or not axes:
        return parameter
    placements = list(parameter.placements)
    placements[axes[0]] = Shard(free[0])
    out = cast(DTensor, parameter.detach()).redistribute(placements=placements)
    return out.requires_grad_(parameter.requires_grad)


def _is_inner_matrix(name: str, tensor: Tensor) -> bool:
    inner = name.startswith("model.layers.") and not name.endswith(".gate.weight")
    return inner and tensor.ndim == 2


def _groups(tensors: Mapping[str, Tensor], decay: float) -> list[dict[str, Any]]:
    groups: dict[Any, dict[str, Any]] = {}
    for tensor in tensors.values():
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        key = (tensor.ndim > 1, mesh)
        group = {"params": [], "weight_decay": decay if tensor.ndim > 1 else 0.0}
        groups.setdefault(key, group)["params"].append(tensor)
    return list(groups.values())
