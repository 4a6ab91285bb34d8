"""Learning rates, optimizers and the gradient norm: AdamW, or Muon for the matrices inside layers.

With ZeRO 1 every rank holds all parameters and gradients, but updates only its shard of each: the
optimizer works on shards, and the updated ones are gathered after its step.

Each gradient's squares are summed where it lies and then over exactly the mesh dimensions that cut
it: data, tensor and expert parallel ranks in any product, and the pipeline at the end. Plain and
``DTensor`` gradients on different meshes never meet in one operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import cos, pi, sqrt
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from .settings.sections import OptimConfig, ScheduleConfig

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


def owners_of(optimizers: Iterable[torch.optim.Optimizer]) -> dict[int, torch.optim.Optimizer]:
    """Return which optimizer updates a tensor, by the tensor's ``id``."""
    return {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}


def rate(step: int, steps: int, config: ScheduleConfig) -> float:
    """Return the factor of the peak learning rate at ``step`` (counted from 0) of ``steps``.

    After a linear warm-up: ``cosine`` and ``linear`` fall to ``floor`` over all the rest,
    ``constant`` stays, ``wsd`` stays and falls over the last ``decay`` steps with 1 - sqrt
    (Hägele et al. 2024).
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.kind == "constant":
        return 1.0
    start = config.warmup
    if config.kind == "wsd":
        start = max(start, steps - (config.decay or max(1, steps // 10)))
    done = min(1.0, max(0, step - start) / max(1, steps - start))
    left = {"cosine": (1 + cos(pi * done)) / 2, "linear": 1 - done, "wsd": 1 - sqrt(done)}
    return config.floor + (1 - config.floor) * left[config.kind]


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
    owners = owners_of(optimizers)
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


def settle(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Sum gradients that are still parts over ranks, in place, and return all gradients."""
    grads = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if (
            isinstance(grad, DTensor)
            and isinstance(parameter, DTensor)
            and grad.placements != parameter.placements
        ):
            grad = parameter.grad = grad.redistribute(placements=parameter.placements)
        grads.append(grad)
    return grads


def total_norm(grads: Iterable[Tensor], pipeline: dist.ProcessGroup | None, like: Tensor) -> Tensor:
    """Return the norm of all gradients of all ranks, each counted once.

    Args:
        grads: this rank's, settled; a tied parameter's once.
        pipeline: ranks with other parts of the model; None for no others.
        like: of the dtype and on the device of the result.
    """
    parts: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for grad in grads:
        groups = _cutters(grad) if isinstance(grad, DTensor) else ()
        parts.setdefault(groups, []).append(_plain(grad))
    total = torch.zeros((), dtype=like.dtype, device=like.device)
    for groups, tensors in parts.items():
        square = torch.stack(torch._foreach_norm(tensors)).to(total).square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        total += square
    if pipeline is not None:
        dist.all_reduce(total, group=pipeline)
    return total.sqrt()


def scale(grads: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients by ``factor``, in place."""
    tensors = [_plain(grad) for grad in grads]
    if tensors:
        torch._foreach_mul_(tensors, factor.to(tensors[0].device))


def _cutters(grad: DTensor) -> tuple[dist.ProcessGroup, ...]:
    mesh = grad.device_mesh
    return tuple(
        mesh.get_group(n)
        for n, p in enumerate(grad.placements)
        if not p.is_replicate() and mesh.size(n) > 1
    )


def _plain(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad
