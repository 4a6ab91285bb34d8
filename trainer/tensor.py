"""Tensor parallelism with torch's parallel styles, and expert parallelism of stacked experts.

Query, key, value, gate and up projections are cut by rows, output and down projections by columns,
embedding and head by vocabulary. With ``sp`` the hidden states between them are cut along the
sequence. What every rank holds whole (norms, the router) becomes a ``DTensor`` with placement
``Replicate``, so that all parameters of a model are of one kind.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Partial

from .attention import RMSNorm
from .mesh import Meshes
from .model import Decoder, Layer
from .moe import Experts, MoE
from .settings.sections import ParallelConfig

_GATHERED = {"gate_proj": Shard(1), "up_proj": Shard(1), "down_proj": Shard(2)}


class _Whole(ParallelStyle):
    """A module whose parameters every rank holds whole.

    ``partial``: ranks see different rows or heads, so gradients are parts of a sum.
    """

    def __init__(self, partial: bool) -> None:
        super().__init__()
        self.partial = partial

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, {})
        if isinstance(module, RMSNorm):
            module.partial = self.partial
        return module


def cut_experts(part: Decoder, meshes: Meshes) -> None:
    """Give each rank its experts (``ep``) and its part of each expert (``tp``), in place."""
    ep, tp = meshes.size("ep") > 1, meshes.size("tp") > 1
    names = tuple(name for name, there in (("ep", ep), ("tp", tp)) if there)
    if not names:
        return
    mesh = meshes.world[names] if len(names) > 1 else meshes.sub(*names)
    for module in part.modules():
        if isinstance(module, Experts):
            cuts: dict[str, list[Placement]] = {
                name: [*([Shard(0)] if ep else []), *([cut] if tp else [])]
                for name, cut in _GATHERED.items()
            }
            _distribute(module, mesh, cuts)
        elif isinstance(module, MoE) and ep:
            module.mesh = meshes.sub("ep")


def cut_tensors(part: Decoder, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Cut a model part over the ranks of ``mesh``, in place; experts are cut already."""
    between: Placement = Shard(1) if config.sp else Replicate()
    norm = _Whole(partial=config.sp)
    plan: dict[str, ParallelStyle] = {}
    if part.first:
        plan["model.embed_tokens"] = RowwiseParallel(
            input_layouts=Replicate(), output_layouts=between
        )
    if part.last:
        plan["model.norm"] = norm
        plan["lm_head"] = ColwiseParallel(
            input_layouts=between,
            output_layouts=Shard(-1) if config.loss_parallel else Replicate(),
            use_local_output=not config.loss_parallel,
        )
    for name, layer in part.model.layers.items():
        assert isinstance(layer, Layer)
        for leaf, style in _layer_plan(layer, between, norm).items():
            plan[f"model.layers.{name}.{leaf}"] = style
    parallelize_module(part, mesh, plan)


def _layer_plan(layer: Layer, between: Placement, norm: _Whole) -> dict[str, ParallelStyle]:
    whole = Replicate()
    plan: dict[str, ParallelStyle] = {
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
        "self_attn": PrepareModuleInput(
            input_layouts=(between, None, None), desired_input_layouts=(whole, None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=between),
    }
    if layer.self_attn.normed:
        plan |= {f"self_attn.{name}": _Whole(partial=True) for name in ("q_norm", "k_norm")}
    feed = layer.feed
    if isinstance(layer.feed_forward, MoE):
        plan[feed] = PrepareModuleInputOutput(
            input_layouts=(between,),
            desired_input_layouts=(whole,),
            output_layouts=Partial(),
            desired_output_layouts=between,
        )
        plan[f"{feed}.gate"] = _Whole(partial=True)
        return plan
    plan[feed] = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(whole,))
    plan[f"{feed}.gate_proj"] = plan[f"{feed}.up_proj"] = ColwiseParallel()
    plan[f"{feed}.down_proj"] = RowwiseParallel(output_layouts=between)
    return plan


def _distribute(module: nn.Module, mesh: DeviceMesh, cuts: dict[str, list[Placement]]) -> None:
    """Replace a module's own parameters by ``DTensor`` ones, whole unless cut; nothing is sent."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not isinstance(parameter, DTensor):
            placements = cuts.get(name) or [Replicate()]
            whole = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
            module.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))
