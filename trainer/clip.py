"""The gradient norm over all meshes, and clipping by it.

Each gradient's squares are summed where it lies and then over exactly the mesh dimensions that cut
it: data, tensor and expert parallel ranks in any product, and the pipeline at the end. Plain and
``DTensor`` gradients on different meshes never meet in one operation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


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
