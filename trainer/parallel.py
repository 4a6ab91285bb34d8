"""Parallelisation of a model with torch's own parts: FSDP2 (``fully_shard``).

Each layer is one unit of gathering, the rest is another. The loss is a sum divided by the global
token count (``loss.py``), so gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from .model import Decoder


def shard(model: Decoder, mesh: DeviceMesh) -> None:
    """Shard parameters, gradients and optimizer states over ``mesh`` (ZeRO stage 3), in place."""
    for layer in model.model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # a plain sum: gloo lacks the pre-multiplied one that a divide factor asks for
            module.set_force_sum_reduction_for_comms(True)
